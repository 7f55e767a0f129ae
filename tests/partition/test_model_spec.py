"""ModelSpec from config.json: defaults, aliases, refusals, and parameter counts known from publication."""

import json
import math
from pathlib import Path

import pytest

from partition.errors import CheckpointError, ConfigError, UnsupportedModelError
from partition.model_spec import ModelSpec
from partition.sharding import units_of

DATA = Path(__file__).parent.parent / "data"
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


@pytest.mark.parametrize(("name", "billions"), [("llama-3.1-405b", 405.853), ("deepseek-v3", 671.026)])
def test_the_parameter_count_is_the_published_one(name, billions):
    spec = ModelSpec.from_config(json.loads((DATA / name / "config.json").read_text()))
    count = sum(math.prod(p.shape) for unit in units_of(spec) for p in unit.parameters)
    assert count / 1e9 == pytest.approx(billions, abs=1e-3)


def test_absent_and_null_keys_take_the_familys_defaults():
    spec = ModelSpec.from_config(LLAMA | {"num_key_value_heads": None, "head_dim": None})
    assert (spec.num_kv_heads, spec.head_dim, spec.tied, spec.max_position) == (4, 16, False, 2048)
    # these families do not derive head_dim from the hidden size
    assert ModelSpec.from_config(LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2}).head_dim == 128
    assert ModelSpec.from_config(LLAMA | {"model_type": "gemma2"}).tied is True


def test_composite_configs_use_their_text_part():
    config = {
        "model_type": "gemma3",
        "text_config": LLAMA | {"model_type": "gemma3_text"},
        "tie_word_embeddings": False,
    }
    spec = ModelSpec.from_config(config)
    assert (spec.model_type, spec.tied) == ("gemma3_text", False)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_several_names(key):
    config = LLAMA | {"model_type": "qwen3_moe", "moe_intermediate_size": 32, key: 5}
    assert ModelSpec.from_config(config).dims["num_experts"] == 5


def test_layer_kinds_follow_the_familys_rule():
    moe = LLAMA | {"moe_intermediate_size": 32, "num_experts": 4, "num_hidden_layers": 4}
    qwen = ModelSpec.from_config(moe | {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert qwen.layer_kinds == ("dense", "moe", "dense", "dense")
    deepseek = json.loads((DATA / "deepseek-v3" / "config.json").read_text())
    assert ModelSpec.from_config(deepseek).layer_kinds == ("dense",) * 3 + ("moe",) * 58


def test_latent_attention_has_its_own_widths():
    spec = ModelSpec.from_config(json.loads((DATA / "deepseek-v3" / "config.json").read_text()))
    assert (spec.head_dim, spec.v_head_dim, spec.num_kv_heads) == (192, 128, 128)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
def test_a_missing_key_is_named(key):
    config = {k: v for k, v in LLAMA.items() if k != key}
    with pytest.raises(ConfigError, match=key):
        ModelSpec.from_config(config)


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, [64], 10**30])
def test_a_senseless_size_is_named(value):
    with pytest.raises(ConfigError, match="hidden_size"):
        ModelSpec.from_config(LLAMA | {"hidden_size": value})


def test_an_unknown_family_is_refused_with_the_nearest():
    with pytest.raises(UnsupportedModelError, match=r"'lama'.*nearest: llama") as caught:
        ModelSpec.from_config(LLAMA | {"model_type": "lama"})
    assert isinstance(caught.value, CheckpointError)
    with pytest.raises(ConfigError, match="model_type"):
        ModelSpec.from_config({})


def test_heads_that_are_no_whole_groups_are_refused():
    with pytest.raises(ConfigError, match="not a multiple"):
        ModelSpec.from_config(LLAMA | {"num_key_value_heads": 3})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        {"rope_scaling": {"type": "su"}},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096}},
        {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
    ],
    ids=str,
)
def test_longrope_is_served_up_to_its_original_length(rope):
    """Past it the library would change the frequencies of every sequence in the batch, without a word."""
    config = LONGROPE | {"original_max_position_embeddings": 4096} | rope
    assert ModelSpec.from_config(config).max_position == 4096
    assert ModelSpec.from_config(LONGROPE).max_position == 131072
    assert ModelSpec.from_config(LONGROPE | {"rope_scaling": {"rope_type": "linear"}}).max_position == 131072


@pytest.mark.parametrize("asked", [True, "all"])
def test_attention_to_both_sides_is_refused(asked):
    """EmbeddingGemma is a gemma3_text: it was run with causal attention, so its numbers were wrong without a word."""
    gemma = LLAMA | {"model_type": "gemma3_text"}
    with pytest.raises(UnsupportedModelError, match=r"use_bidirectional_attention: .*model for embeddings"):
        ModelSpec.from_config(gemma | {"use_bidirectional_attention": asked})
    for harmless in (False, None, "vision"):
        assert ModelSpec.from_config(gemma | {"use_bidirectional_attention": harmless}).num_layers


def test_longrope_of_unknown_original_length_is_refused():
    with pytest.raises(UnsupportedModelError, match="original_max_position_embeddings"):
        ModelSpec.from_config(LONGROPE | {"rope_scaling": {"type": "longrope"}})


LONGROPE = {
    "model_type": "phi3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "vocab_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 131072,
}
