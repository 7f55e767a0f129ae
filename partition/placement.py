"""Stages to nodes, and what each node's host memory may hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partition.errors import BudgetError, ConfigError
from partition.hardware import HardwareFacts, NodeFacts
from partition.plan_data import PlanOptions
from partition.sizes import format_size

_LEAST_RESERVE_BYTES = 64 << 20
_RESERVE_PER_CENT = 3


@dataclass(frozen=True, kw_only=True)
class HostLimit:
    """Bytes that the ranks of a node may take for weights, slots, KV and activations together."""

    limit_bytes: int
    source: str
    footprint_bytes: int


def place_stages(hardware: HardwareFacts, *, tensor: int, pipeline: int, device: str) -> tuple[int, ...]:
    """The node of each stage: a stage's ranks share a node, consecutive stages fill it, nodes get equal shares.

    Raises ConfigError when no node has enough accelerators or room for a stage, or all together not for all stages.
    """
    if not hardware.nodes:
        raise ConfigError("there are no nodes to place ranks on")
    room = [_room(node, device, tensor * pipeline) for node in hardware.nodes]
    capacity = [ranks // tensor for ranks in room]
    if sum(capacity) < pipeline:
        there = ", ".join(f"{node.name}: {ranks}" for node, ranks in zip(hardware.nodes, room, strict=True))
        what = "accelerators" if device == "cuda" else "places for ranks"
        raise ConfigError(
            f"device {device!r} needs {tensor} {what} on one node for each of {pipeline} stages, "
            f"there are {there}: change parallel.tensor or parallel.pipeline"
        )
    counts = [0] * len(capacity)
    for _ in range(pipeline):
        free = [node for node, limit in enumerate(capacity) if counts[node] < limit]
        counts[min(free, key=lambda node: counts[node])] += 1
    return tuple(node for node, count in enumerate(counts) for _ in range(count))


def _room(node: NodeFacts, device: str, num_ranks: int) -> int:
    """Ranks that the node may run, of so many."""
    most = num_ranks if node.max_ranks is None else node.max_ranks
    return min(most, len(node.devices) if device == "cuda" else num_ranks)


def host_limits(hardware: HardwareFacts, stage_nodes: Sequence[int], options: PlanOptions) -> dict[int, HostLimit]:
    """For each node with ranks: the user's limit, or what is there less the processes and a reserve.

    Raises BudgetError when the user's limit is more than the node has.
    """
    limits = {}
    for node in sorted(set(stage_nodes)):
        facts = hardware.nodes[node]
        num_ranks = options.tensor * sum(1 for other in stage_nodes if other == node)
        footprint = options.process_footprint_bytes * num_ranks
        footprint += options.launcher_footprint_bytes if node == 0 else 0
        usable = facts.memory_bytes - footprint
        if options.host_memory is not None:
            if options.host_memory > usable:
                raise BudgetError(
                    f"offload.host_memory is {format_size(options.host_memory)} on node {facts.name}, which has "
                    f"{format_size(facts.memory_bytes)} ({facts.memory_source}) less {format_size(footprint)} for "
                    f"{num_ranks} worker processes: set offload.host_memory to at most {format_size(max(0, usable))}"
                )
            limits[node] = HostLimit(
                limit_bytes=options.host_memory, source="offload.host_memory", footprint_bytes=footprint
            )
            continue
        reserve = max(_LEAST_RESERVE_BYTES, facts.memory_bytes * _RESERVE_PER_CENT // 100)
        if usable <= reserve:
            raise BudgetError(
                f"node {facts.name} has {format_size(facts.memory_bytes)} ({facts.memory_source}), but {num_ranks} "
                f"worker processes need {format_size(footprint)} and {format_size(reserve)} stay in reserve before any "
                f"weight is loaded: use more memory or fewer ranks (parallel.tensor, parallel.pipeline)"
            )
        limits[node] = HostLimit(limit_bytes=usable - reserve, source=facts.memory_source, footprint_bytes=footprint)
    return limits
