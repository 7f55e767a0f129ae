"""Tiny configs: every causal type has one that builds, and what makes a family is still in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dist_infer.check_arch.run import NEW_TOKENS, PROMPTS
from dist_infer.check_arch.tiny_config import (
    VOCAB,
    causal_types,
    exceptions,
    is_directory,
    shrunk,
    text_type,
    tiny_config,
    tiny_config_of,
)
from partition.errors import CheckpointError, UnsupportedModelError

WITHOUT = {"blt", "emu3", "gemma4_assistant", "mllama", "musicgen", "musicgen_melody"}
MOST_PARAMETERS = 12_000_000
MOST_LAYERS = 16  # longcat_flash counts each of its 8 twice


@pytest.mark.slow
def test_every_type_builds_from_its_tiny_config() -> None:
    """Guards the rules against a family (or a new version's) that they make a senseless or a large config of."""
    without: dict[str, str] = {}
    for model_type in causal_types():
        kind = text_type(model_type)
        if kind != model_type and kind in causal_types():
            continue  # is walked under its own name
        try:
            config = tiny_config(model_type)
        except UnsupportedModelError as error:
            without[model_type] = str(error)
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        assert num_parameters < MOST_PARAMETERS, f"{model_type} is not tiny: {num_parameters}"
        layers = getattr(config, "num_hidden_layers", None)
        assert layers is None or layers <= MOST_LAYERS, model_type
    assert without.keys() == WITHOUT, without


def test_exceptions_have_reasons_and_known_keys() -> None:
    """Guards the data file against a typing error: a key that no config has would be taken without a word."""
    for model_type, entry in exceptions().items():
        assert model_type in CONFIG_MAPPING, model_type
        assert entry.keys() in ({"impossible"}, {"reason", "set"}), model_type
        known = CONFIG_MAPPING[model_type]().to_dict().keys() if "set" in entry else set()
        # set by a base class, or the name that the config takes it under
        assert entry.get("set", {}).keys() - known <= {"default_language", "decoder_vocab_size"}, model_type


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("deepseek_v3", {"kv_lora_rank": 16, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1}),
        ("gemma2", {"sliding_window": 8, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
        ("llama4_text", {"attention_chunk_size": 8, "num_local_experts": 8}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
        ("phi3", {"sliding_window": 8}),
    ],
)
def test_what_makes_the_family_is_kept(model_type: str, expected: dict[str, Any]) -> None:
    """Guards the point of the check: a model without window, latent or experts would show nothing of them."""
    config = tiny_config(model_type)
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.vocab_size == VOCAB


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "qwen3_next", "llama4_text", "axk2"])
def test_every_kind_of_layer_occurs(model_type: str) -> None:
    """Guards against a pattern cut before its first full layer."""
    assert set(tiny_config(model_type).layer_types) == set(CONFIG_MAPPING[model_type]().layer_types)


def test_a_window_is_shorter_than_the_sequences() -> None:
    """Guards the windows' and chunks' sizes: one that no sequence leaves is never tested."""
    longest = max(len(prompt) for prompt in PROMPTS) + NEW_TOKENS
    assert tiny_config("mistral").sliding_window * 2 < longest
    assert tiny_config("llama4_text").attention_chunk_size * 2 < longest


def test_a_pattern_that_ends_late_is_brought_forward() -> None:
    """Guards `layer_types` whose only layer of a kind is beyond the cut."""
    kinds = ["a"] * 30 + ["b"]
    values = shrunk({"num_hidden_layers": 31, "layer_types": kinds, "full_attn_idxs": [1, 30]})
    assert values["layer_types"] == ["a"] * 7 + ["b"]
    assert values["num_hidden_layers"] == 8
    assert values["full_attn_idxs"] == [1]


def test_a_count_that_is_smaller_stays() -> None:
    """Guards no window, no group, no dense layer: they are how the family is built."""
    values = shrunk({"num_hidden_layers": 40, "sliding_window": None, "n_group": 1, "first_k_dense_replace": 0})
    assert (values["sliding_window"], values["n_group"], values["first_k_dense_replace"]) == (None, 1, 0)


def test_a_model_directory_keeps_its_flags() -> None:
    """Guards PATH: the model's own bias and tying are what is to be checked, and its quantization is not."""
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
        "quantization_config": {"quant_method": "fp8"},
    }
    tiny = tiny_config_of(config)
    assert (tiny.attention_bias, tiny.tie_word_embeddings) == (True, True)
    assert (tiny.hidden_size, tiny.num_hidden_layers, tiny.vocab_size) == (64, 8, VOCAB)
    assert getattr(tiny, "quantization_config", None) is None


def test_composite_types_are_their_text_part() -> None:
    """Guards vision-language types: what runs is the language model, under the name it then has."""
    assert text_type("gemma3") == "gemma3_text"
    assert tiny_config("gemma3").model_type == "gemma3_text"
    assert text_type("llama") == "llama"


def test_a_name_that_is_nothing_gets_the_nearest() -> None:
    """Guards the message for a typing error."""
    with pytest.raises(CheckpointError, match="nearest: llama"):
        is_directory("lama")
