"""Stages on nodes that differ: none where there is no room, and each as large as its node can keep up with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partition.errors import ConfigError
from partition.hardware import HardwareFacts, NodeFacts
from partition.model_spec import ModelSpec
from partition.placement import place_stages
from partition.plan import PlanOptions, make_plan
from partition.shares import stage_shares
from partition.stages import cut_stages
from partition.work import prepare

MIB = 1 << 20
SPEC = ModelSpec.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 512,
        "vocab_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 2048,
        "max_position_embeddings": 1024,
    }
)
TWO_STAGES = PlanOptions(
    name="test", pipeline=2, process_footprint_bytes=0, kv_memory=2 * MIB, max_batch_tokens=16, max_requests=4
)


def node(name: str, memory: int = 4096 * MIB, disk: float = 1e9, rate: float = 20e9, **more: int | None) -> NodeFacts:
    return NodeFacts(
        name=name,
        cores=4,
        memory_bytes=memory,
        memory_source="test",
        devices=(),
        disk_bytes_per_s=disk,
        flops=5e11,
        memory_bytes_per_s=rate,
        **more,  # type: ignore[arg-type]
    )


def cluster(*nodes: NodeFacts) -> HardwareFacts:
    return HardwareFacts(nodes=nodes)


def test_a_node_takes_no_more_ranks_than_it_is_given() -> None:
    """Guards against a stage on the coordinator's own node, which has no CPUs in Ray, or on one with half a stage."""
    hardware = cluster(node("head", max_ranks=0), node("a", max_ranks=3), node("b", max_ranks=4))
    assert place_stages(hardware, tensor=2, pipeline=3, device="cpu") == (1, 2, 2)
    with pytest.raises(ConfigError, match=r"2 places for ranks on one node for each of 4.*head: 0, a: 3, b: 4"):
        place_stages(hardware, tensor=2, pipeline=4, device="cpu")


def test_alike_nodes_are_cut_evenly() -> None:
    """Measured figures never agree; a cut that followed them would be packed anew at every start."""
    alike = cluster(node("a", disk=1.0e9), node("b", disk=1.2e9))
    assert stage_shares(prepare(SPEC, alike, TWO_STAGES, embedding_rows=False)) is None
    even = make_plan(SPEC, cluster(node("a"), node("b")), TWO_STAGES)
    assert [(rank.first_layer, rank.end_layer) for rank in make_plan(SPEC, alike, TWO_STAGES).ranks] == [
        (rank.first_layer, rank.end_layer) for rank in even.ranks
    ]


def test_the_slower_disk_gets_less_to_stream() -> None:
    """With equal stages the pipeline would run at the pace of the slow disk, the other idle for two thirds."""
    options = replace(TWO_STAGES, host_memory=48 * MIB)
    uneven = make_plan(SPEC, cluster(node("slow", disk=0.3e9), node("fast", disk=0.9e9)), options)
    streamed = [rank.streamed_bytes_per_pass for rank in uneven.ranks]
    assert 2 * streamed[0] < streamed[1]
    even = make_plan(SPEC, cluster(node("slow", disk=0.3e9), node("slow too", disk=0.3e9)), options)
    assert uneven.prediction.decode_tokens_per_s > 1.5 * even.prediction.decode_tokens_per_s


def test_the_node_with_more_memory_gets_more_layers() -> None:
    """What fits into both memories together is not streamed because an even cut is too large for one of them."""
    plan = make_plan(SPEC, cluster(node("small", memory=128 * MIB), node("large", memory=1024 * MIB)), TWO_STAGES)
    sizes = [rank.end_layer - rank.first_layer for rank in plan.ranks]
    assert sum(sizes) == 16
    assert sizes[0] < sizes[1]
    assert all(rank.streamed_bytes_per_pass == 0 for rank in plan.ranks)


def test_shares_that_fit_go_by_speed_up_to_what_memory_holds() -> None:
    nodes = cluster(node("a", rate=10e9), node("b", rate=30e9))
    first, second = stage_shares(prepare(SPEC, nodes, TWO_STAGES, embedding_rows=False)) or (0, 0)
    assert second == pytest.approx(3 * first)
    work = prepare(
        SPEC, cluster(node("a", rate=10e9), node("b", memory=140 * MIB, rate=90e9)), TWO_STAGES, embedding_rows=False
    )
    first, second = stage_shares(work) or (0, 0)
    assert second == pytest.approx(0.8 * work.limits[1].limit_bytes)
    assert first + second == pytest.approx(sum(sum(sizes) for stage in work.stages for sizes in stage.sizes))


def test_a_cut_by_shares() -> None:
    assert cut_stages([10] * 8, embed_bytes=0, head_bytes=0, num_stages=2, shares=[1.0, 3.0]) == ((0, 2), (2, 8))
