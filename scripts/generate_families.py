"""Write partition/families.json: every parameter of every supported family, its symbolic shape and how it splits.

Source of truth: the model classes and tensor-parallel plans of the installed transformers, with the overrides in
partition/family_overrides.json merged over the plans. A tiny model is built on the meta device with dimensions that are
all different numbers, so a size names its dimension. Run it after a transformers upgrade; a test compares the result.

    python scripts/generate_families.py [--check]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dist_infer.model.adapter import kept_dtypes

PARTITION = Path(__file__).resolve().parent.parent / "partition"
TABLE = PARTITION / "families.json"
OVERRIDES = PARTITION / "family_overrides.json"

# model_type -> how config.json decides the kind of each layer
FAMILIES = {
    "llama": "dense",
    "mistral": "dense",
    "qwen2": "dense",
    "qwen3": "dense",
    "gemma2": "dense",
    "gemma3_text": "dense",
    "phi3": "dense",
    "olmo2": "dense",
    "cohere2": "dense",
    "glm4": "dense",
    "gpt_oss": "moe",
    "mixtral": "moe",
    "qwen3_moe": "sparse_step",
    "deepseek_v2": "first_k_dense",
    "deepseek_v3": "first_k_dense",
}
SIZES = {
    "vocab_size": 1009,
    "hidden_size": 318,
    "intermediate_size": 410,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 36,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 9, "num_local_experts": 9, "num_experts_per_tok": 2, "moe_intermediate_size": 70}
LATENT = {
    "n_routed_experts": 9,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 70,
    "num_key_value_heads": 6,
    "q_lora_rank": 58,
    "kv_lora_rank": 46,
    "qk_nope_head_dim": 28,
    "qk_rope_head_dim": 20,
    "v_head_dim": 22,
    "n_shared_experts": 3,
    "n_group": 1,
    "topk_group": 1,
}
DIMS = {
    "vocab": 1009,
    "hidden": 318,
    "inter": 410,
    "2*inter": 820,
    "head_dim": 36,
    "heads": 6,
    "q_width": 6 * 36,
    "kv_width": 3 * 36,
    "qkv_width": (6 + 2 * 3) * 36,
    "num_experts": 9,
    "moe_inter": 70,
    "2*moe_inter": 140,
    "shared_inter": 3 * 70,
    "q_lora": 58,
    "kv_lora": 46,
    "kv_a_width": 46 + 20,
    "q_b_width": 6 * (28 + 20),
    "kv_b_width": 6 * (28 + 22),
    "o_width": 6 * 22,
}
AXIS = {
    "vocab": "vocab",
    "inter": "mlp",
    "2*inter": "mlp",
    "heads": "q_head",
    "q_width": "q_head",
    "kv_width": "kv_head",
    "moe_inter": "expert_mlp",
    "2*moe_inter": "expert_mlp",
    "shared_inter": "shared_mlp",
    "q_b_width": "q_head",
    "kv_b_width": "q_head",
    "o_width": "q_head",
}
DEFAULTS_KEPT = (  # config keys whose absence from config.json means the class default
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "n_shared_experts",
    "q_lora_rank",
    "num_experts_per_tok",
    "sliding_window",
    "max_window_layers",
)
WHOLE = {"colwise_gather_output", "rowwise_split_input", "replicated_with_grad_allreduce", "mla_kv_a_proj"}


def main() -> int:
    """Write the table, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    text = render(build_table())
    if parser.parse_args().check:
        current = TABLE.read_text() == text
        print(f"{TABLE} is {'current' if current else 'stale: run scripts/generate_families.py'}")
        return 0 if current else 1
    TABLE.write_text(text)
    return 0


def render(table: dict[str, Any]) -> str:
    """JSON with one parameter a line, so that a diff reads well."""
    families = []
    for family, entry in table.items():
        lines = [f'    "{key}": {json.dumps(value)}' for key, value in entry.items() if key not in ("layers", "outer")]
        lines.append(f'    "outer": {_rows(entry["outer"], 4)}')
        kinds = ",\n".join(f'      "{kind}": {_rows(rows, 6)}' for kind, rows in entry["layers"].items())
        lines.append(f'    "layers": {{\n{kinds}\n    }}')
        families.append(f'  "{family}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(families) + "\n}\n"


def _rows(rows: list[dict[str, Any]], indent: int) -> str:
    pad = " " * indent
    return "[\n" + ",\n".join(f"{pad}  {json.dumps(row)}" for row in rows) + f"\n{pad}]"


def build_table() -> dict[str, Any]:
    """The whole table, from the installed transformers."""
    if len(set(DIMS.values())) != len(DIMS):
        raise ValueError("two dimensions have the same number: a size would not name its dimension")
    overrides = json.loads(OVERRIDES.read_text())
    return {family: build_family(family, rule, overrides.get(family, {})) for family, rule in FAMILIES.items()}


def build_family(family: str, rule: str, override: dict[str, Any]) -> dict[str, Any]:
    """One family: its config defaults, modules, parameters with splits, and collectives."""
    config_class = CONFIG_MAPPING[family]
    declared = {f.name: f.default for f in fields(config_class) if f.default is not MISSING}
    defaults = {key: declared[key] for key in DEFAULTS_KEPT if key in declared}
    flags = [flag for flag in ("attention_bias", "mlp_bias") if flag in declared]
    if "q_lora_rank" in declared:
        flags.append("q_lora")

    seen: dict[str, dict[str, set[tuple[bool, ...]]]] = {}  # table ("outer" or layer kind) -> name -> variants
    shapes: dict[str, tuple[int, ...]] = {}
    kept: dict[str, dict[str, str]] = {}  # in float32 by the library, whatever half precision the model has
    for variant in itertools.product((False, True), repeat=len(flags)):
        model, kinds = build_model(family, rule, dict(zip(flags, variant, strict=True)))
        exact = kept_dtypes(model)
        for name, tensor in model.state_dict().items():
            kind, pattern = "outer", name
            if name.startswith("model.layers."):
                layer = int(name.split(".")[2])
                kind, pattern = kinds[layer], name.replace(f"model.layers.{layer}.", "model.layers.{i}.", 1)
            seen.setdefault(kind, {}).setdefault(pattern, set()).add(variant)
            shapes[pattern] = tuple(tensor.shape)
            kept[pattern] = exact.get(name, {})
    plan = {**(model._tp_plan or {}), **override.get("plan", {})}

    rows: dict[str, list[dict[str, Any]]] = {}
    collectives: list[dict[str, Any]] = []
    for kind, parameters in seen.items():
        for name, variants in parameters.items():
            row: dict[str, Any] = {"name": name, "shape": [dimension(size) for size in shapes[name]]}
            row |= override.get("rows", {}).get(name) or split_of(name, row["shape"], plan)
            if when := conditions(flags, variants):
                row["when"] = when
            row |= kept[name]
            rows.setdefault(kind, []).append(row)
            add_collective(collectives, kind, name, row, plan)
    collectives += override.get("collectives", [])
    layers = {kind: table for kind, table in rows.items() if kind != "outer"}
    split_rows = [row for table in layers.values() for row in table if row.get("split", {}).get("axis") == "q_head"]
    return {
        "architecture": type(model).__name__,
        "layer_rule": rule,
        "attention": "heads" if split_rows else "replicated",
        "converted": any("experts." in row["name"] for table in layers.values() for row in table),
        "defaults": defaults,
        "flags": flags,
        "collectives": collectives,
        "outer": rows["outer"],
        "layers": dict(sorted(layers.items())),
    }


def build_model(family: str, rule: str, flags: dict[str, bool]) -> tuple[Any, list[str]]:
    """A two-layer meta-device model under these flags, and the kind of each of its layers."""
    values: dict[str, Any] = SIZES | {"num_hidden_layers": 2}
    kinds = ["dense", "dense"]
    if rule == "moe":
        values |= {key: EXPERTS[key] for key in ("num_local_experts", "num_experts_per_tok")}
        values["intermediate_size"] = EXPERTS["moe_intermediate_size"]  # the only width of such a model is its experts'
        kinds = ["moe", "moe"]
    elif rule == "sparse_step":
        values |= EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": [0]}
        kinds = ["dense", "moe"]
    elif rule == "first_k_dense":
        values |= LATENT | {"first_k_dense_replace": 1}
        values.pop("head_dim")
        kinds = ["dense", "moe"]
    values |= {flag: value for flag, value in flags.items() if flag != "q_lora"}
    if not flags.get("q_lora", True):
        values["q_lora_rank"] = None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values), dtype=torch.bfloat16), kinds


def dimension(size: int) -> str:
    """The one dimension with this size."""
    for name, value in DIMS.items():
        if value == size:
            return name
    raise ValueError(f"no dimension has the size {size}")


def style_of(module: str, plan: dict[str, str]) -> str | None:
    """The plan's style for a module path with {i} for the layer."""
    return plan.get(module.replace("{i}", "*"))


def split_of(name: str, shape: list[str], plan: dict[str, str]) -> dict[str, Any]:
    """{"split": …} and {"once": true} as the plan has it; nothing for a parameter that stays whole."""
    module, _, leaf = name.rpartition(".")
    style = style_of(name, plan) or style_of(module, plan)  # experts are planned by parameter, Linears by module
    if style in ("mla_kv_a_proj", None) or (style in WHOLE and module != "lm_head"):
        return {}
    if style == "moe_tp_experts":
        raise ValueError(f"{name}: the experts module is planned but not this parameter of it")
    blocks = 1
    if style == "rowwise":
        if leaf == "bias":
            return {"once": True}
        dim = len(shape) - 1
    elif style == "packed_colwise":
        dim, blocks = len(shape) - 2, 2
    elif style in ("colwise", "colwise_gather_output", "embedding_rowwise"):
        dim = 0
    else:
        raise ValueError(f"{name}: the plan's style {style!r} is not known here")
    return {"split": {"dim": dim, "axis": AXIS[shape[dim]], "blocks": blocks}}


def conditions(flags: list[str], variants: set[tuple[bool, ...]]) -> list[str]:
    """The conjunction of flags ("!" negates) under which a parameter exists; refuses anything else."""
    found = []
    for position, flag in enumerate(flags):
        values = {variant[position] for variant in variants}
        if len(values) == 1:
            found.append(flag if True in values else f"!{flag}")
    expected = {
        variant
        for variant in itertools.product((False, True), repeat=len(flags))
        if all(variant[flags.index(c.lstrip("!"))] is not c.startswith("!") for c in found)
    }
    if expected != variants:
        raise ValueError(f"a parameter exists under {variants} of {flags}: no conjunction of flags says that")
    return found


def add_collective(
    collectives: list[dict[str, Any]], kind: str, name: str, row: dict[str, Any], plan: dict[str, str]
) -> None:
    """Record the module's collective once, with the layer kinds that have it."""
    module, _, leaf = name.rpartition(".")
    style = style_of(module, plan)
    if leaf == "bias" or "split" not in row:
        return
    if style == "embedding_rowwise":
        operation = "mask_all_reduce"
    elif module == "lm_head":
        operation = "gather_vocab"
    elif style in ("rowwise", "moe_tp_experts"):
        operation = "all_reduce"
    else:
        return
    for known in collectives:
        if known["module"] == module:
            if kind not in known["layer_kinds"]:
                known["layer_kinds"].append(kind)
            return
    collectives.append({"module": module, "kind": operation, "layer_kinds": [] if kind == "outer" else [kind]})


if __name__ == "__main__":
    sys.exit(main())
