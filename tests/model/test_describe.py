"""Types that no table has: described from their class, and refused unless they were found equal to transformers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from dist_infer.check_arch.tiny_config import tiny_config
from dist_infer.messages import Chunk
from dist_infer.model.adapter import meta_model
from dist_infer.model.describe import checked_types, describe, unchecked_types
from dist_infer.model.sequence_cache import SequenceCache, SequenceCaches, alone
from dist_infer.startup import spec_of
from partition.errors import UnsupportedModelError
from partition.families import family_table
from partition.model_spec import ModelSpec
from partition.plan import Plan
from partition.sharding import cut_axes, units_of


def config_of(model_type: str) -> dict[str, Any]:
    config: dict[str, Any] = tiny_config(model_type).to_dict()
    return config


@pytest.mark.parametrize(
    ("model_type", "path"), [("gpt2", "packed"), ("opt", "packed"), ("falcon", "fallback"), ("jamba", "stepwise")]
)
def test_a_described_type_has_exactly_its_class_parameters(model_type: str, path: str) -> None:
    """Guards a parameter in no unit, which would be computed with whatever lies in memory."""
    spec = describe(config_of(model_type))
    ours = {p.name: p.shape for unit in units_of(spec) for p in unit.parameters}
    model = meta_model(config_of(model_type), torch.float32, path=path)
    assert ours == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert spec.path == path
    embed, *_, head = units_of(spec)
    assert any("emb" in p.name or "wte" in p.name for p in embed.parameters)
    assert any("norm" in p.name or "ln_f" in p.name for p in head.parameters)


def test_positions_that_are_looked_up_belong_to_the_first_stage() -> None:
    names = [p.name for p in units_of(describe(config_of("gpt2")))[0].parameters]
    assert names == ["transformer.wte.weight", "transformer.wpe.weight"]


def test_what_was_not_found_equal_is_refused_by_name() -> None:
    """Guards wrong numbers without a word: a class may look right and be wrong (moshi does)."""
    assert "moshi" not in checked_types()
    with pytest.raises(UnsupportedModelError, match=r"'moshi' is not among the \d+ types .*check-arch moshi"):
        spec_of(config_of("moshi"))
    with unchecked_types():
        assert spec_of(config_of("moshi")).table is not None
    with pytest.raises(UnsupportedModelError, match="no_such_type"):
        spec_of({"model_type": "no_such_type"})


def test_the_table_and_the_list_agree() -> None:
    """A family of the table is a promise: it is on the list of what was found equal, on the packed path."""
    assert {name: checked_types().get(name) for name in family_table()} == dict.fromkeys(family_table(), "packed")
    assert len(checked_types()) >= 75


def test_a_described_type_is_cut_in_stages_only() -> None:
    spec = describe(config_of("gpt2"))
    assert cut_axes(spec, 1).tensor == 1
    with pytest.raises(UnsupportedModelError, match=re.escape("gpt2 cannot be cut into tensor ranks")):
        cut_axes(spec, 2)


def test_a_spec_of_a_described_type_survives_the_plans_json() -> None:
    """Ranks get the spec inside the plan and build from nothing else."""
    from pydantic import TypeAdapter

    assert "model" in Plan.__dataclass_fields__
    spec = describe(config_of("qwen3_next"))
    adapter = TypeAdapter(type(spec))
    again = adapter.validate_json(adapter.dump_json(spec))
    assert units_of(again) == units_of(spec)
    assert (again.path, again.state_elements) == (spec.path, spec.state_elements)
    assert spec.state_elements > 0


def test_states_take_what_follows_a_first_chunk_token_by_token() -> None:
    chunks = (Chunk("a", 0, 3, False), Chunk("b", 4, 3, True))
    assert list(alone(chunks, stepwise=False)) == [(chunks[0],), (chunks[1],)]
    assert list(alone(chunks, stepwise=True)) == [
        (chunks[0],),
        (Chunk("b", 4, 1, False),),
        (Chunk("b", 5, 1, False),),
        (Chunk("b", 6, 1, True),),
    ]


def test_caches_begin_anew_and_end_with_their_request() -> None:
    """Guards a preempted request that goes on with its old states."""
    config = meta_model(config_of("falcon"), torch.float32, path="fallback").config
    caches = SequenceCaches(config, range(2))
    first = caches.of((Chunk("a", 0, 2, False),))
    assert caches.of((Chunk("a", 2, 1, True),)) is first
    assert caches.of((Chunk("a", 0, 3, True),)) is not first
    caches.drop(["a", "unknown"])
    assert len(caches) == 0


def test_a_stage_knows_how_long_a_sequence_is_without_its_first_layer() -> None:
    """Guards masks of stages above the first: the library asks layer 0."""
    config = meta_model(config_of("falcon"), torch.float32, path="fallback").config
    cache = SequenceCache(config, range(2, 4))
    cache.num_computed = 7
    assert cache.get_seq_length() == 7
    assert cache.get_query_offset() == 7
    assert cache.get_mask_sizes(3, 0) == (10, 0)


def fallback_spec(model_type: str, **changes: Any) -> ModelSpec:
    config = config_of(model_type)
    return describe({**config, **changes})


@pytest.mark.parametrize(
    ("model_type", "elements"),
    [
        ("falcon", {2 * 16}),  # one key for all heads, which its config does not say by a number
        ("mamba", {0}),
        ("jamba", {0, 2 * 2 * 16}),
        ("mimo_v2_flash", {2 * 2 * 16, 4 * 2 * 16}),  # more KV heads in windowed layers
        ("kimi_linear", {0, 16 + 8}),  # latents in the library's own cache
        ("qwen4_exp_text", {0, 2 * 2 * 16 + 16}),  # keys of an indexer beside keys and values
        ("dbrx", {2 * 2 * 16}),  # its first layer alone runs without weights
        ("jetmoe", {2 * 2 * 16}),  # and none of these
    ],
)
def test_what_a_token_keeps_is_found_layer_by_layer(model_type: str, elements: set[int]) -> None:
    """Guards plans for falcon with 71 times its KV, and ones for mamba that count KV it has not got."""
    spec = fallback_spec(model_type)
    assert len(spec.kv_elements) == spec.num_layers
    assert set(spec.kv_elements) == elements


@pytest.mark.parametrize(("model_type", "eager"), [("bloom", True), ("gptj", True), ("falcon", False), ("opt", False)])
def test_a_type_without_another_attention_is_known(model_type: str, eager: bool) -> None:
    """Its scores are computed whole, which the plan has to count."""
    assert fallback_spec(model_type).family["eager"] is eager


def test_states_that_cannot_be_counted_are_refused_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were planned as nothing, and a server ran out of memory with its first requests."""

    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no such kernel on meta")

    monkeypatch.setattr("transformers.models.jamba.modeling_jamba.JambaMambaMixer.forward", fails)
    with pytest.raises(UnsupportedModelError, match=r"jamba: .* without weights .*no such kernel on meta"):
        fallback_spec("jamba")


def test_attention_to_both_sides_is_refused_for_types_of_no_table_too() -> None:
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention: True"):
        fallback_spec("gemma", use_bidirectional_attention=True)
