"""Every tensor degree from 1 to 8 gives the numbers of transformers, on sizes that it does not divide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from thread_ranks import logits_of
from transformers import AutoModelForCausalLM

from partition.errors import ConfigError
from partition.families import family_table
from partition.model_spec import ModelSpec
from partition.sharding import cut_axes, units_of

IDS = [(11 * i) % 151 + 3 for i in range(13)]


@pytest.mark.parametrize("family", sorted(family_table()))
def test_every_degree_equals_eager(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Guards uneven cuts: 10 heads in 5 groups, 104 columns, a vocabulary of 163 among 3, 5, 7 ranks."""
    odd = {"vocab_size": 163, "num_hidden_layers": 2, "num_attention_heads": 10, "hidden_size": 80}
    odd |= {"num_key_value_heads": 10 if family.startswith("deepseek") else 5}
    odd |= {"moe_intermediate_size": 88} if family in ("qwen3_moe", "deepseek_v2", "deepseek_v3") else {}
    odd |= {} if family.startswith("deepseek") else {"head_dim": 8}
    path = tiny_checkpoint(family, **odd, intermediate_size=104)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([IDS]), use_cache=False).logits[0]
    for degree in range(1, 9):
        found = logits_of(path, IDS, tensor=degree)
        error = float((found - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-5, f"tensor degree {degree}: {error:.1e}"


@pytest.mark.parametrize("family", sorted(family_table()))
def test_tensor_ranks_share_what_a_layer_holds(family: str) -> None:
    """Guards against a family whose large parameters every rank would hold and read whole."""
    from conftest import tiny_config  # the same small sizes as elsewhere

    config = tiny_config(family).to_dict()
    spec = ModelSpec.from_config(config)
    cut = cut_axes(spec, 2)
    for unit in units_of(spec)[1:-1]:
        whole = [p for p in unit.parameters if p.split is None and len(p.shape) > 1]
        small = ("gate.weight", "router", "_a_proj", "bias")
        left = [p.name for p in whole if not any(word in p.name for word in small)]
        assert left == [], f"{unit.name}: every rank holds all of {left}"
    with pytest.raises(ConfigError):
        cut_axes(spec, spec.num_heads + 1)
    assert cut.tensor == 2
