"""What layers keep of a token: the bytes of published models, and plans whose windowed layers keep rings."""

import json
from pathlib import Path

import pytest

from partition.errors import BudgetError
from partition.hardware import HardwareFacts, NodeFacts
from partition.kv_layout import (
    kv_bytes_per_token,
    layers_kv,
    paged_bytes_per_token,
    ring_bytes_per_request,
    ring_rows_of,
)
from partition.model_spec import ModelSpec
from partition.plan import PlanOptions, describe_kv, make_plan, plan_from_json, plan_to_json
from partition.sharding import cut_axes

ROOT = Path(__file__).parent.parent
MIB = 1 << 20


def dense(model_type, layers, hidden, heads, kv_heads, head_dim, **more):
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 32000,
        **more,
    }


def data(name):
    return json.loads((ROOT / "data" / name / "config.json").read_text())


PUBLISHED = {  # config, bytes a token in bfloat16, bytes of a token past the window
    "Llama 3.1 405B": (data("llama-3.1-405b"), 126 * 8 * 256 * 2, 126 * 8 * 256 * 2),
    "DeepSeek-V3": (data("deepseek-v3"), 61 * 576 * 2, 61 * 576 * 2),
    "Gemma 3 27B": (dense("gemma3_text", 62, 5376, 32, 16, 128, sliding_window=1024), 62 * 16 * 256 * 2, 10 * 8192),
    "Gemma 2 9B": (dense("gemma2", 42, 3584, 16, 8, 256), 42 * 8 * 512 * 2, 21 * 8 * 512 * 2),
    "Mistral 7B v0.1": (dense("mistral", 32, 4096, 32, 8, 128), 32 * 8 * 256 * 2, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_per_token_of_published_models(name):
    """Also those in the table of docs/kv-cache.md."""
    config, whole, past = PUBLISHED[name]
    spec = ModelSpec.from_config(config)
    assert kv_bytes_per_token(spec, "bfloat16") == whole
    assert kv_bytes_per_token(spec, "float32") == 2 * whole
    assert kv_bytes_per_token(spec, "bfloat16", within_window=False) == past
    (row,) = [line for line in (ROOT.parent / "docs/kv-cache.md").read_text().splitlines() if f"| {name} |" in line]
    assert f"| {whole:,} |" in row
    assert f"| {past:,} |" in row


def test_latent_attention_keeps_a_seventieth_of_its_heads():
    spec = ModelSpec.from_config(data("deepseek-v3"))
    assert kv_bytes_per_token(spec, "bfloat16") == 70_272
    expanded = spec.num_layers * spec.num_kv_heads * (spec.head_dim + spec.v_head_dim) * 2
    assert expanded == 4_997_120
    assert expanded // 70_272 == 71


@pytest.mark.parametrize("tensor", [2, 3, 8])
def test_ranks_share_heads_but_each_has_the_latent(tensor):
    split = ModelSpec.from_config(data("llama-3.1-405b"))
    latent = ModelSpec.from_config(data("deepseek-v3"))
    assert kv_bytes_per_token(split, "bfloat16", tensor=tensor) == kv_bytes_per_token(split, "bfloat16")
    assert kv_bytes_per_token(latent, "bfloat16", tensor=tensor) == tensor * 70_272


def test_a_ring_only_where_it_is_shorter_than_the_longest_sequence():
    spec = ModelSpec.from_config(PUBLISHED["Gemma 3 27B"][0])
    rows = ring_rows_of(spec, max_batch_tokens=512, max_model_len=8192)
    assert [rows.count(size) for size in (1536, 0)] == [52, 10]
    assert rows[5] == rows[11] == 0
    assert not any(ring_rows_of(spec, max_batch_tokens=512, max_model_len=1536))
    layers = layers_kv(spec, cut_axes(spec, 1), 0, rows)
    assert paged_bytes_per_token(layers, "bfloat16") == 10 * 8192
    assert ring_bytes_per_request(layers, "bfloat16") == 52 * 1536 * 8192


def windowed(model_type="gemma3_text", window=64, **more):
    return ModelSpec.from_config(
        dense(model_type, 12, 512, 8, 4, 64, sliding_window=window, max_position_embeddings=4096, **more)
    )


def plan(spec, host_memory, **changes):
    node = NodeFacts(
        name="a",
        cores=4,
        memory_bytes=64 << 30,
        memory_source="cgroup",
        devices=(),
        disk_bytes_per_s=1.5e9,
        flops=1e12,
        memory_bytes_per_s=20e9,
    )
    wanted = {"max_requests": 8, "max_batch_tokens": 64} | changes
    options = PlanOptions(name="x", host_memory=host_memory, process_footprint_bytes=0, **wanted)
    return make_plan(spec, HardwareFacts(nodes=(node,)), options)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_a_plan_counts_full_layers_by_tokens_and_rings_by_requests(tensor, pipeline):
    made = plan(windowed(), 512 * MIB, tensor=tensor, pipeline=pipeline, max_model_len=2048)
    assert [rows > 0 for rows in made.ring_rows] == [True] * 5 + [False] + [True] * 5 + [False]
    assert set(made.ring_rows) == {0, 128}
    row = 4 * (64 + 64) * 2  # bytes of a token in a layer, all heads
    found = sum(rank.kv_bytes for rank in made.ranks)
    assert found == row * (2 * made.num_kv_blocks * made.block_tokens + 10 * 8 * 128)
    assert plan_from_json(plan_to_json(made)) == made
    (chosen,) = [choice for choice in made.kv_choices if choice.chosen]
    assert chosen.kv_bytes == found
    line = describe_kv(made)
    assert "12,288 bytes per token" in line
    assert "2,048 past the window: 10 of 12 layers keep 128 rows" in line


def test_where_all_layers_keep_rings_blocks_weigh_nothing():
    """Division by the bytes of a block; and the engine still counts blocks, so there must be enough of them."""
    for more in ({}, {"kv_memory": 60 * MIB}, {"max_model_len": 3000}):
        made = plan(windowed("mistral"), 512 * MIB, **more)
        assert all(made.ring_rows)
        assert made.ranks[0].kv_bytes == 12 * 8 * 128 * 4 * 128 * 2
        assert made.num_kv_blocks * made.block_tokens >= 8 * made.max_model_len
        assert made.max_model_len == more.get("max_model_len", 4096)


def test_rings_yield_to_blocks_where_memory_is_short():
    """64 rings of a long window would be a misfit, or push the weights out, where a few short requests fit."""
    spec = windowed("mistral", window=1024)
    rings = 12 * 64 * 1088 * 4 * 128 * 2
    made = plan(spec, 200 * MIB, max_requests=64)
    assert rings > 200 * MIB
    assert made.ring_rows == ()
    assert made.ranks[0].kv_bytes < 200 * MIB
    given = plan(spec, 2048 * MIB, max_requests=64, kv_memory=50 * MIB)
    assert given.ring_rows == ()
    assert given.ranks[0].kv_bytes <= 50 * MIB
    with pytest.raises(BudgetError, match=r"one sequence of 4096 tokens needs .* of KV cache a rank"):
        plan(spec, 2048 * MIB, max_requests=64, kv_memory=5 * MIB, max_model_len=4096)


def test_where_neither_rings_nor_blocks_fit_both_reasons_are_told():
    """A lower engine.max_requests helps the rings, a lower engine.max_model_len the blocks: people need both."""
    with pytest.raises(BudgetError) as caught:
        plan(windowed("mistral"), 2048 * MIB, kv_memory=MIB, max_model_len=2048)
    words = str(caught.value)
    assert words.startswith(
        "one sequence of 2048 tokens needs 24.00 MiB of KV cache a rank, engine.kv_memory is 1.00 MiB"
    )
    assert "with rings for windowed layers instead of blocks: " in words


def test_windows_past_the_longest_sequence_change_nothing():
    made = plan(windowed(window=4096), 512 * MIB)
    assert made.ring_rows == ()
    assert "past the window" not in describe_kv(made)


def test_latent_kv_is_told_and_leaves_room():
    config = data("deepseek-v3") | {
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "n_routed_experts": 8,
        "vocab_size": 4096,
    }
    spec = ModelSpec.from_config(config)
    made = plan(spec, 4096 * MIB)
    line = describe_kv(made)
    assert f"{4 * 576 * 2:,} bytes per token (latent attention)" in line
    assert made.ranks[0].kv_bytes == made.num_kv_blocks * made.block_tokens * 4 * 576 * 2
    assert made.ranks[0].num_kv_heads == 1
