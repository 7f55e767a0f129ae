"""When an embedding stays on disk: where it makes room for what is streamed, and only there."""

from __future__ import annotations

import pytest

from partition.errors import BudgetError
from partition.hardware import HardwareFacts, NodeFacts
from partition.model_spec import ModelSpec
from partition.plan import PlanOptions, make_plan

MIB = 1 << 20


def spec(vocab):
    return ModelSpec.from_config(
        {
            "model_type": "llama",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": vocab,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        }
    )


def plan(vocab, host_memory, rows=True):
    node = NodeFacts(
        name="n",
        cores=2,
        memory_bytes=16 << 30,
        memory_source="test",
        devices=(),
        disk_bytes_per_s=2e9,
        flops=1e12,
        memory_bytes_per_s=2e10,
    )
    options = PlanOptions(
        name="t",
        host_memory=host_memory,
        max_requests=2,
        max_model_len=64,
        max_batch_tokens=64,
        embedding_rows=rows,
    )
    return make_plan(spec(vocab), HardwareFacts(nodes=(node,)), options)


def tier(found):
    return next(unit.tier for unit in found.ranks[0].units if unit.name == "embed")


def test_it_makes_room_where_weights_are_streamed():
    """A plan that keeps 64 MiB for a few rows a pass streams as much more of the layers."""
    with_rows, without = plan(32000, 300 * MIB), plan(32000, 300 * MIB, rows=False)
    assert (tier(with_rows), tier(without)) == ("rows", "host")
    assert with_rows.ranks[0].streamed_bytes_per_pass < without.ranks[0].streamed_bytes_per_pass
    assert with_rows.ranks[0].host_bytes <= 300 * MIB


def test_it_stays_where_everything_fits():
    assert tier(plan(32000, 2048 * MIB)) == "host"


def test_a_small_one_stays_though_weights_are_streamed():
    """Reading rows takes a buffer that a small embedding is not worth; tiny budgets must not fail for it."""
    found = plan(4000, 200 * MIB)
    assert found.ranks[0].streamed_bytes_per_pass > 0
    assert tier(found) != "rows"


def test_a_budget_for_neither_is_refused_with_the_figures_of_the_usual_way():
    with pytest.raises(BudgetError, match=r"offload\.host_memory"):
        plan(32000, 20 * MIB)
