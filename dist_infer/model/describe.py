"""Any causal type of the installed transformers as a ModelSpec: what no table has is asked of the model class.

The class is built on the meta device and run there once, so that nothing is guessed: the parameters are those of its
state dict, a unit is what runs before, in, or after a decoder layer, and the heads are those that reach attention.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
from torch import nn

from dist_infer.model import attention
from dist_infer.model.adapter import kept_dtypes, layers_name, meta_model
from dist_infer.model.cache_probe import probe_cache
from dist_infer.model.latent_attention import latent_dim_of
from partition.errors import UnsupportedModelError
from partition.model_spec import ModelSpec, longest_position, refuse_bidirectional, text_config

Path = Literal["packed", "fallback", "stepwise"]
_BY_CAUTION: tuple[Path, ...] = ("packed", "fallback", "stepwise")
_PROBE_TOKENS = 5
_WINDOWED, _PLAIN = "sliding_attention", ("full_attention", "sliding_attention")
_WITH_STATE = ("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent")
# whose states go on from where they are with several tokens at once; found by dist-infer check-arch
_TAKE_SEVERAL = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "granitemoehybrid")
# attention is narrowed by masks of the library's own, or by scores computed beside it
_ELSEWHERE = ("attention_chunk_size", "index_topk", "index_n_heads")
_KNOWN_ARGUMENTS = {  # of attention calls: understood, or known to change no number
    "dropout",
    "position_ids",
    "scaling",
    "sliding_window",
    "softcap",
    "s_aux",
    "use_cache",
    "output_attentions",
    "output_router_logits",
}


class _Unchecked:
    allowed = False


@contextmanager
def unchecked_types() -> Iterator[None]:
    """Within it types are accepted that were never compared with transformers: for the comparison itself."""
    before, _Unchecked.allowed = _Unchecked.allowed, True
    try:
        yield
    finally:
        _Unchecked.allowed = before


@cache
def checked_types() -> Mapping[str, Path]:
    """model_type -> path ("packed" | "fallback" | "stepwise") of the types that gave transformers' own numbers."""
    document = json.loads(resources.files("dist_infer.model").joinpath("checked_types.json").read_text())
    types: Mapping[str, Path] = document["types"]
    return types


def describe(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a type that partition's family table does not have; it can be cut in stages, not in tensor ranks.

    Raises UnsupportedModelError: transformers does not know it, it was not found equal to transformers, or the class
    is built in a way that cannot be cut into units, or keeps of a sequence what cannot be counted.
    """
    text = text_config(config)
    model_type = str(text.get("model_type"))
    refuse_bidirectional(text)
    if not _Unchecked.allowed and model_type not in checked_types():
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not among the {len(checked_types())} types that were found to give the "
            f"numbers of transformers (docs/models.md); `dist-infer check-arch {model_type}` says what is wrong with it"
        )
    model = meta_model(config, torch.float32, experts="batched_mm")
    model_config = model.config
    num_layers = model_config.num_hidden_layers
    layers = layers_name(model, num_layers)
    seen = _probe(model, layers)
    path = _path_of(model_config, num_layers, seen)
    if not _Unchecked.allowed:  # never more boldly than the type was checked, or than this config looks
        path = max(path, checked_types()[model_type], key=_BY_CAUTION.index)
    kinds, tables, outer = _tables(model, layers, num_layers, seen, kept_dtypes(meta_model(config, torch.bfloat16)))
    num_heads, num_kv_heads, head_dim, v_head_dim = _heads(model_config, seen)
    vocab = int(model_config.vocab_size)
    hidden = int(model_config.hidden_size)
    sizes = {size for rows in (outer, *tables.values()) for row in rows for size in row["shape"]}
    experts = next(
        (getattr(model_config, key) for key in ("num_experts", "num_local_experts", "n_routed_experts")
         if isinstance(getattr(model_config, key, None), int)), 1,
    )  # fmt: skip
    per_token = getattr(model_config, "num_experts_per_tok", None)
    dims = {size: int(size) for size in sizes} | {
        "hidden": hidden,
        "vocab": vocab,
        "inter": int(_integer(model_config, "intermediate_size") or 4 * hidden),
        "num_experts": max(1, experts),
        "experts_per_token": per_token if isinstance(per_token, int) and per_token > 0 else 1,
    }
    if path == "packed" and (latent := _latent_dim(model.get_submodule(layers), seen)):
        dims["kv_a_width"] = latent
    keeps = probe_cache(config, num_layers, num_kv_heads * (head_dim + v_head_dim)) if path != "packed" else None
    return ModelSpec(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        max_position=longest_position(text, model_type, _max_position(model_config)),
        tied=bool(text.get("tie_word_embeddings", _declared_tied(model_config))),
        layer_kinds=kinds,
        dims=dims,
        flags={},
        windows=_windows(seen) if path == "packed" else (),
        path=path,
        state_elements=keeps.state_elements if keeps else 0,
        kv_elements=keeps.kv_elements if keeps else (),
        table={
            "eager": keeps is not None and keeps.eager,
            "architecture": type(model).__name__,
            "attention": "replicated",
            "flags": [],
            "collectives": [],
            "layer_outputs": seen.layer_outputs,
            "outer": outer,
            "layers": tables,
        },
    )


_Described = tuple[str, tuple[int, ...], tuple[tuple[str, str], ...]]  # name within the layer, shape, kept dtypes


@dataclass
class _Seen:
    """What happened in one forward: attention calls in order, and outer modules by when they ran first."""

    calls: list[attention.AttentionCall] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    in_layers: bool = False
    layer_outputs: int | None = None  # 0: a tensor; else the length of a tuple; None: it never came to that
    problem: str = ""


def _probe(model: Any, layers: str) -> _Seen:
    """Run the class on the meta device. A failure is no refusal: it may come from what meta tensors cannot do."""
    seen = _Seen()
    stack = model.get_submodule(layers)
    handles = []

    def enter(module: nn.Module, _args: Any) -> None:
        seen.in_layers = True

    def outer(name: str) -> Any:
        def note(_module: nn.Module, _args: Any) -> None:
            known = seen.after if seen.in_layers else seen.before
            if name not in seen.before + seen.after:
                known.append(name)

        return note

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        seen.layer_outputs = len(output) if isinstance(output, tuple) else 0

    for layer in stack:
        handles.append(layer.register_forward_pre_hook(enter))
        handles.append(layer.register_forward_hook(leave))
    for name, module in model.named_modules():
        inside = name == layers or name.startswith(f"{layers}.")
        if not inside and (module._parameters or module._buffers):
            handles.append(module.register_forward_pre_hook(outer(name)))
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta")
    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    positions = torch.arange(_PROBE_TOKENS, device="meta")[None]
    try:
        with torch.inference_mode(), attention.recorded_calls() as calls:
            model(input_ids=ids, use_cache=False, **({"position_ids": positions} if takes else {}))
    except Exception as error:
        seen.problem = f"{type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
    seen.calls = calls
    return seen


def _path_of(config: Any, num_layers: int, seen: _Seen) -> Path:
    """Packed where our attention is called once a layer with nothing it does not know, else a path of its own."""
    calls, kinds = seen.calls, getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) & set(_WITH_STATE) and config.model_type not in _TAKE_SEVERAL:
        return "stepwise"
    if seen.problem or [call.layer for call in calls] != list(range(num_layers)):
        return "fallback"
    if len({(call.num_heads, call.num_kv_heads, call.head_dim, call.v_head_dim) for call in calls}) > 1:
        return "fallback"
    if any(call.arguments - _KNOWN_ARGUMENTS for call in calls):
        return "fallback"
    if kinds is not None and (len(kinds) != num_layers or not set(kinds) <= set(_PLAIN)):
        return "fallback"
    windows = [call.window for call in calls]
    if kinds is not None and any((w is None) != (kind != _WINDOWED) for w, kind in zip(windows, kinds, strict=True)):
        return "fallback"  # a window that only the library's masks know of, or one that no layer type announces
    if kinds is None and getattr(config, "sliding_window", None) and not any(windows):
        return "fallback"
    if any(getattr(config, key, None) for key in _ELSEWHERE):
        return "fallback"
    return "packed"


def _tables(
    model: Any, layers: str, num_layers: int, seen: _Seen, kept: Mapping[str, dict[str, str]]
) -> tuple[tuple[str, ...], dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Each layer's kind, the parameters of each kind, and those outside of layers with their unit.

    kept: `kept_dtypes` of the same model.
    """
    own: list[list[_Described]] = [[] for _ in range(num_layers)]
    outer: list[dict[str, Any]] = []
    for name, tensor in model.state_dict().items():
        if not tensor.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{model.config.model_type}: {name} is stored as {tensor.dtype}: only floating point is moved"
            )
        if name.startswith(f"{layers}."):
            index, _, rest = name.removeprefix(f"{layers}.").partition(".")
            own[int(index)].append((rest, tuple(tensor.shape), tuple(kept.get(name, {}).items())))
        else:
            owner = name.rpartition(".")[0]
            unit = "embed" if owner in seen.before else "head"
            if seen.problem and owner not in seen.before + seen.after:
                unit = "embed" if model.get_submodule(owner) is model.get_input_embeddings() else "head"
            outer.append(_row(name, tuple(tensor.shape), kept.get(name, {}).items()) | {"unit": unit})
    alike: dict[tuple[_Described, ...], str] = {}
    kinds = tuple(alike.setdefault(tuple(rows), f"kind{len(alike)}") for rows in own)
    tables = {
        kind: [_row(f"{layers}.{{i}}.{name}", shape, dtypes) for name, shape, dtypes in rows]
        for rows, kind in alike.items()
    }
    if not any(row["unit"] == "embed" for row in outer) or not any(row["unit"] == "head" for row in outer):
        raise UnsupportedModelError(f"{model.config.model_type}: no embedding or no head outside of its layers")
    return kinds, tables, outer


def _row(name: str, shape: tuple[int, ...], dtypes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    return {"name": name, "shape": [str(size) for size in shape], **dict(dtypes)}


def _heads(config: Any, seen: _Seen) -> tuple[int, int, int, int]:
    """Query heads, KV heads, widths of keys and values: the largest of any layer, or what the config lets expect."""
    if seen.calls:
        return (
            max(call.num_heads for call in seen.calls),
            max(call.num_kv_heads for call in seen.calls),
            max(call.head_dim for call in seen.calls),
            max(call.v_head_dim for call in seen.calls),
        )
    heads = int(_integer(config, "num_attention_heads") or 1)
    width = int(_integer(config, "head_dim") or max(1, int(config.hidden_size) // heads))
    return heads, int(_integer(config, "num_key_value_heads") or heads), width, width


def _windows(seen: _Seen) -> tuple[int | None, ...]:
    windows = tuple(call.window for call in seen.calls)
    return windows if any(windows) else ()


def _latent_dim(stack: Any, seen: _Seen) -> int:
    """What latent attention keeps of a token; 0 unless all layers have it, plain."""
    if any(call.arguments & {"sliding_window", "softcap", "s_aux"} for call in seen.calls):
        return 0
    found = {latent_dim_of(layer) for layer in stack}
    return found.pop() if len(found) == 1 else 0


def _integer(config: Any, key: str) -> int | None:
    value = getattr(config, key, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _max_position(config: Any) -> int:
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if found := _integer(config, key):
            return found
    return 32768  # no position is ever looked up: what people ask of such a model has no limit of its own


def _declared_tied(config: Any) -> bool:
    declared = getattr(type(config), "tie_word_embeddings", None)
    return declared if isinstance(declared, bool) else True  # PretrainedConfig's own default
