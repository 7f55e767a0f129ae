"""The planner's windows, from config.json alone, are what the model classes pass to attention when they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_config

from dist_infer.model import attention
from dist_infer.model.adapter import meta_model
from partition.config_keys import ConfigKeys
from partition.errors import ConfigError
from partition.families import family_of, family_table
from partition.windows import RULES, windows_of

NUM_LAYERS = 8
SIZES: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LATENT = {"deepseek_v2", "deepseek_v3"}  # their classes refuse the sizes above; they have no windows
TYPES = sorted((family_table().keys() | RULES.keys()) - LATENT)
CHANGES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 7},
    {"sliding_window": None},
    {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3},
    {"use_sliding_window": True},
    {"sliding_window": 7, "use_sliding_window": False},
    {"sliding_window": 7, "sliding_window_pattern": 2},
    {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"] * 4, "use_sliding_window": True},
]


def windows_of_config(config: dict[str, Any], model_type: str) -> tuple[int | None, ...]:
    return windows_of(ConfigKeys(config, family_of(model_type)["defaults"], model_type), NUM_LAYERS)


def windows_at_run_time(config: dict[str, Any]) -> tuple[int | None, ...]:
    model = meta_model(config, torch.float32, experts="batched_mm")
    ids = torch.zeros(1, 3, dtype=torch.long, device="meta")
    with torch.inference_mode(), attention.recorded_calls() as calls:
        model(input_ids=ids, position_ids=torch.arange(3, device="meta")[None], use_cache=False)
    return tuple(call.window for call in calls)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_windows_are_those_of_the_model_class(model_type: str, changes: dict[str, Any]) -> None:
    """Guards the rules and the class defaults behind keys that config.json leaves out."""
    config = {"model_type": model_type, **SIZES, **changes}
    assert windows_of_config(config, model_type) == windows_at_run_time(config)


@pytest.mark.parametrize("model_type", TYPES)
def test_windows_of_a_written_config(model_type: str) -> None:
    """A config.json that names every key, as save_pretrained writes it."""
    config = tiny_config(model_type).to_dict()
    assert windows_of_config(config, model_type) == windows_at_run_time(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "'sliding_window' is 0, but must be a whole number of at least 1"),
        ({"sliding_window": True}, "'sliding_window' is True"),
        ({"layer_types": ["sliding_attention"]}, "'layer_types' must list a kind for each of the 8 layers"),
        ({"sliding_window_pattern": "2"}, "'sliding_window_pattern' is '2'"),
    ],
)
def test_senseless_keys_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        windows_of_config(changes, "gemma3_text")
