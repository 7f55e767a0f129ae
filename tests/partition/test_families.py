"""The family table against the library's own models: current, of the same shapes, and computing the same when split."""

import importlib.util
from pathlib import Path

import pytest

from partition.families import family_table
from partition.model_spec import ModelSpec
from partition.sharding import units_of

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(family_table())
DEADLINE_S = 60.0


def config_of(family, **changes):
    """A small model with 6 heads in 3 groups, three layers, and nothing at its default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    rule = family_table()[family]["layer_rule"]
    if "head_dim" in family_table()[family]["defaults"] and rule != "first_k_dense":
        values["head_dim"] = 16
    if rule != "dense":
        values |= {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
    if rule == "moe":
        values |= {"num_local_experts": 4, "intermediate_size": 40}
    elif rule == "sparse_step":
        values |= {"num_experts": 4, "mlp_only_layers": [1]}
    elif rule == "first_k_dense":
        values |= {"n_routed_experts": 4, "num_key_value_heads": 6, "first_k_dense_replace": 1, "n_shared_experts": 2}
        values |= {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
        values |= {"v_head_dim": 10, "n_group": 1, "topk_group": 1}
    return CONFIG_MAPPING[family](**values | changes)


def model_of(config, device):
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def test_the_table_is_current():
    script = ROOT / "scripts" / "generate_families.py"
    loader = importlib.util.spec_from_file_location("generate_families", script)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    assert (ROOT / "partition" / "families.json").read_text() == module.render(module.build_table())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_the_librarys_shape(family):
    flags = family_table()[family]["flags"]
    variants = [{}, {"num_attention_heads": 8, "num_key_value_heads": 8 if "deepseek" in family else 2}]
    variants += [{flag: True} for flag in flags if flag != "q_lora"]
    variants += [{"q_lora_rank": None, "attention_bias": True}] if "q_lora" in flags else []
    for changes in variants:
        config = config_of(family, **changes)
        spec = ModelSpec.from_config(config.to_diff_dict() | {"model_type": family})
        ours = {p.name: p.shape for unit in units_of(spec) for p in unit.parameters}
        theirs = {name: tuple(tensor.shape) for name, tensor in model_of(config, "meta").state_dict().items()}
        assert ours == theirs
