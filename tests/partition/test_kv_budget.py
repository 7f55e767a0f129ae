"""KV and weights in one budget: the split that decodes fastest, and the reason for it in the plan."""

import itertools
from dataclasses import replace

import pytest

from partition.errors import BudgetError
from partition.hardware import HardwareFacts, NodeFacts
from partition.model_spec import ModelSpec
from partition.plan import PlanOptions, describe_kv, make_plan

MIB = 1 << 20
SPEC = ModelSpec.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "vocab_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 2816,
        "max_position_embeddings": 4096,
    }
)
WEIGHTS = 620 * MIB
REQUEST = 2048 * 24 * 8 * (64 + 64) * 2  # bytes of KV for the expected length


def hardware(disk=1.5e9, flops=1e12):
    node = NodeFacts(
        name="a",
        cores=4,
        memory_bytes=64 << 30,
        memory_source="cgroup",
        devices=(),
        disk_bytes_per_s=disk,
        flops=flops,
        memory_bytes_per_s=20e9,
    )
    return HardwareFacts(nodes=(node,))


def plan(host_memory, facts=None, **changes):
    wanted = {"max_requests": 8, "max_batch_tokens": 64} | changes
    options = PlanOptions(name="x", host_memory=host_memory, process_footprint_bytes=0, **wanted)
    return make_plan(SPEC, facts or hardware(), options)


def chosen(made):
    (choice,) = (choice for choice in made.kv_choices if choice.chosen)
    return choice


@pytest.mark.parametrize("memory", range(250, 1500, 125))
@pytest.mark.parametrize("disk", [2e8, 2e9])
def test_the_fastest_split_is_taken(memory, disk):
    made = plan(memory * MIB, hardware(disk))
    best = max(choice.tokens_per_s for choice in made.kv_choices)
    mine = chosen(made)
    assert mine.tokens_per_s >= 0.99 * best
    # of those as fast, the one that holds the longest sequences
    assert not [c for c in made.kv_choices if c.tokens_per_s >= 0.99 * best and c.num_blocks > mine.num_blocks]
    assert mine.num_blocks == made.num_kv_blocks
    assert mine.kv_bytes == sum(rank.kv_bytes for rank in made.ranks)
    assert mine.resident_bytes == sum(rank.resident_bytes for rank in made.ranks)
    assert mine.tokens_per_s == pytest.approx(made.prediction.decode_tokens_per_s)
    assert [c.num_blocks for c in made.kv_choices] == sorted({c.num_blocks for c in made.kv_choices})


def test_far_from_residency_the_batch_wins_and_near_it_the_weights():
    """A fixed quarter for KV held one request while streaming, and streamed where all weights could have stayed."""
    far = plan(450 * MIB)
    assert chosen(far).batch >= 3
    assert far.ranks[0].kv_bytes > far.ranks[0].resident_bytes
    # five requests fit beside all weights: eight would make every pass wait for a slow disk
    near = plan(WEIGHTS + 5 * REQUEST, hardware(disk=1e8))
    assert near.ranks[0].streamed_bytes_per_pass == 0
    assert 3 <= chosen(near).batch < 8


def test_more_memory_is_never_slower():
    rates = [plan(memory * MIB).prediction.decode_tokens_per_s for memory in range(300, 1700, 25)]
    assert all(after > 0.98 * before for before, after in itertools.pairwise(rates))
    assert rates[-1] > 5 * rates[0]


def test_sequences_too_short_to_use_buy_no_speed():
    """One request alone: every block less is a little faster, down to a few tokens."""
    made = plan(WEIGHTS + REQUEST // 2, max_requests=1)
    assert made.max_model_len >= 2048
    assert made.ranks[0].streamed_bytes_per_pass > 0


def test_the_trial_and_the_plan_predict_the_same():
    """Eight requests in micro-batches of three: every layer's fixed cost three times, in both."""
    made = plan(4 * WEIGHTS, max_batch_tokens=3)
    assert chosen(made).batch == 8
    assert chosen(made).tokens_per_s == pytest.approx(made.prediction.decode_tokens_per_s)
    assert made.prediction.seconds_per_pass > 3 * 24 * 0.7e-3


def test_kv_that_was_given_is_kept():
    made = plan(600 * MIB, kv_memory=3 * REQUEST)
    assert [(choice.kv_bytes, choice.batch, choice.chosen) for choice in made.kv_choices] == [(3 * REQUEST, 3, True)]


def test_one_long_sequence_is_the_least():
    made = plan(WEIGHTS, max_model_len=4096, max_requests=8)
    assert min(choice.num_blocks for choice in made.kv_choices) * made.block_tokens == 4096
    assert made.max_model_len == 4096
    with pytest.raises(BudgetError, match=r"4096 tokens needs .* raise offload.host_memory or lower engine.max_model"):
        plan(180 * MIB, max_model_len=4096)


def test_the_reason_is_told():
    made = plan(WEIGHTS // 2, max_requests=32)
    mine = chosen(made)
    line = describe_kv(made)
    assert line.startswith("KV ")
    assert f"for {mine.batch} requests at a time" in line
    assert f"{mine.tokens_per_s:.3g} tok/s" in line
    assert "with about half of it" in line
    assert describe_kv(replace(made, kv_choices=())).startswith("KV ")
