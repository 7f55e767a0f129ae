"""Every element of every parameter is owned as the sharding says: once, or by all; heads are never cut."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partition.errors import ConfigError
from partition.families import family_table
from partition.model_spec import ModelSpec
from partition.sharding import (
    collectives_of,
    cut_axes,
    local_heads,
    shard_intervals,
    shard_shape,
    splits_attention,
    units_of,
)


@st.composite
def configs(draw):
    family = draw(st.sampled_from(sorted(family_table())))
    kv_heads = draw(st.integers(1, 6))
    heads = kv_heads * draw(st.integers(1, 5))
    config = {
        "model_type": family,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "hidden_size": heads * draw(st.integers(1, 9)),
        "vocab_size": draw(st.integers(40, 3000)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.integers(1, 16)),
        "intermediate_size": draw(st.integers(40, 2000)),
        "max_position_embeddings": 128,
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "num_experts": draw(st.integers(1, 4)),
        "num_experts_per_tok": 1,
        "moe_intermediate_size": draw(st.integers(40, 300)),
        "mlp_only_layers": [0],
        "first_k_dense_replace": draw(st.integers(0, 5)),
        "n_shared_experts": draw(st.integers(1, 3)),
    }
    if family.startswith("deepseek"):
        config |= {"kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5}
        config["q_lora_rank"] = draw(st.sampled_from([None, 11]))
    return config


def covers(intervals, size):
    """Whether the intervals, joined, are [0, size) without overlap."""
    at = 0
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if start != at:
            return False
        at = end
    return at == size


@given(config=configs(), tensor=st.integers(1, 8))
def test_every_element_is_owned_as_the_sharding_says(config, tensor):
    spec = ModelSpec.from_config(config)
    if splits_attention(spec) and tensor > spec.num_heads:
        with pytest.raises(ConfigError, match="attention heads"):
            cut_axes(spec, tensor)
        return
    cut = cut_axes(spec, tensor)
    shared_kv = tensor > spec.num_kv_heads
    for parameter in (p for unit in units_of(spec) for p in unit.parameters):
        owned = [shard_intervals(parameter, cut, rank) for rank in range(tensor)]
        if parameter.split is None:
            assert all(not intervals for intervals in owned)
            assert all(shard_shape(parameter, cut, rank) == parameter.shape for rank in range(tensor))
            continue
        size = parameter.shape[parameter.split.dim]
        if "kv_head" in (parameter.split.axis, *parameter.split.axes) and shared_kv:
            # ranks share KV heads: the distinct intervals cover, and sharers have equal ones
            assert covers(set(itertools.chain(*owned)), size)
        else:
            assert covers(list(itertools.chain(*owned)), size)
        for rank, intervals in enumerate(owned):
            assert len(intervals) == (len(parameter.split.axes) or parameter.split.blocks)
            shape = shard_shape(parameter, cut, rank)
            assert shape[parameter.split.dim] == sum(end - start for start, end in intervals) > 0
            if parameter.split.axes:
                continue
            # blocks of a packed parameter (gate and up) must give a rank the same positions of each block
            part = size // parameter.split.blocks
            first = [(start % part, (end - 1) % part) for start, end in intervals]
            assert len(set(first)) == 1


@given(kv=st.integers(1, 16), group=st.integers(1, 8), tensor=st.integers(1, 32))
def test_heads_go_with_the_kv_head_they_attend_to(kv, group, tensor):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": kv * group * 4,
        "vocab_size": 64,
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "intermediate_size": 64,
    }
    spec = ModelSpec.from_config(config)
    if tensor > kv * group:
        with pytest.raises(ConfigError, match=f"at most {kv * group}"):
            cut_axes(spec, tensor)
        return
    cut = cut_axes(spec, tensor)
    q_counts = []
    for rank in range(tensor):
        (q_start, q_end), (kv_start, kv_end) = cut.intervals["q_head"][rank], cut.intervals["kv_head"][rank]
        for head in range(q_start, q_end):
            assert kv_start <= head // group < kv_end
        # attention repeats each local KV head equally often, so the local ratio must be whole
        assert (q_end - q_start) % (kv_end - kv_start) == 0
        assert local_heads(spec, cut, rank) == (q_end - q_start, kv_end - kv_start)
        q_counts.append(q_end - q_start)
        if tensor > kv:
            assert kv_start == rank * kv // tensor
    assert min(q_counts) > 0
    if tensor <= kv:
        assert q_counts == sorted(q_counts, reverse=True)
        assert max(q_counts) - min(q_counts) <= group


def spec_of(**changes):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 576,
        "vocab_size": 49152,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "attention_bias": True,
        "tie_word_embeddings": True,
    }
    return ModelSpec.from_config(config | changes)


def test_nine_heads_in_three_groups_over_two_ranks():
    cut = cut_axes(spec_of(), 2)
    assert cut.intervals["q_head"] == ((0, 6), (6, 9))
    assert cut.intervals["kv_head"] == ((0, 2), (2, 3))


def test_even_axes_are_cut_at_multiples_of_32():
    cut = cut_axes(spec_of(), 5)
    for axis in ("mlp", "vocab"):
        assert all(start % 32 == 0 for start, _ in cut.intervals[axis])
    sizes = [end - start for start, end in cut.intervals["vocab"]]
    assert max(sizes) - min(sizes) <= 32


def test_parts_are_multiples_of_8_while_every_rank_can_have_8():
    """Grouped matrix products of experts refuse rows that are no whole 16 bytes, e.g. 40 columns over 4 ranks as 10."""
    spec = spec_of(intermediate_size=40)
    assert cut_axes(spec, 4).intervals["mlp"] == ((0, 16), (16, 24), (24, 32), (32, 40))
    assert cut_axes(spec, 6).intervals["mlp"][0] == (0, 8)
    assert cut_axes(spec_of(intermediate_size=7), 3).intervals["mlp"] == ((0, 4), (4, 6), (6, 7))


def test_an_axis_smaller_than_tensor_is_refused():
    with pytest.raises(ConfigError, match=r"tensor is 6.*vocab.*5"):
        cut_axes(spec_of(vocab_size=5), 6)


def test_a_row_parallel_bias_is_added_once():
    unit = units_of(spec_of())[1]
    once = [parameter.name for parameter in unit.parameters if parameter.once]
    assert once == ["model.layers.0.self_attn.o_proj.bias"]


def test_units_are_in_order_and_a_tied_head_has_its_own_copy():
    units = units_of(spec_of())
    assert [unit.name for unit in units] == ["embed", "layers.0", "layers.1", "head"]
    assert [parameter.name for parameter in units[-1].parameters] == ["model.norm.weight", "lm_head.weight"]
    names = [parameter.name for unit in units for parameter in unit.parameters]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("family", sorted(family_table()))
def test_every_row_parallel_weight_has_its_all_reduce(family):
    """A weight that is cut along its input without a collective after it gives a partial sum: silently wrong."""
    entry = family_table()[family]
    for kind, rows in entry["layers"].items():
        reduced = {c["module"] for c in entry["collectives"] if c["kind"] == "all_reduce" and kind in c["layer_kinds"]}
        cut_inputs = set()
        for row in rows:
            module, _, leaf = row["name"].rpartition(".")
            width = len(row["shape"])
            if width < 2 or leaf.endswith("bias"):  # a norm, or what is added to a result
                continue
            input_dim = width - 2 if family == "gpt_oss" and width == 3 else width - 1  # its experts lie transposed
            if row.get("split", {}).get("dim") == input_dim:
                cut_inputs.add(module)
        assert cut_inputs == reduced


def test_collectives_name_only_modules_that_the_model_has():
    dense = {c.module for c in collectives_of(spec_of())}
    assert dense == {
        "model.embed_tokens",
        "lm_head",
        "model.layers.{i}.self_attn.o_proj",
        "model.layers.{i}.mlp.down_proj",
    }


def test_shards_of_all_ranks_have_all_elements():
    spec = spec_of()
    cut = cut_axes(spec, 2)
    for parameter in (p for unit in units_of(spec) for p in unit.parameters if p.split):
        total = sum(math.prod(shard_shape(parameter, cut, rank)) for rank in range(2))
        assert total == math.prod(parameter.shape)
