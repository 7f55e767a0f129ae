"""A placement group per stage: its tensor ranks together, on the very node that the plan has for it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.nodes import ClusterNode
from partition.errors import ClusterError
from partition.plan import Plan, RankPlan

_PLACE_TIMEOUT_S = 30.0  # placing takes milliseconds when there is room; waiting longer only hides that there is none
_LOOK_S = 2.0  # between looks whether the node is still there
_NODE_ID_LABEL = "ray.io/node-id"  # Ray gives it to every node itself
_DEADLINE_HINT = " (cluster.start_timeout)"


def rank_resources(plan: Plan, extra: Mapping[str, float]) -> dict[str, float]:
    """What Ray sets aside for one rank. extra: `cluster.node_resources`."""
    return {"CPU": 1.0} | ({"GPU": 1.0} if plan.device == "cuda" else {}) | dict(extra)


def ask_for_stage(
    plan: Plan, stage: int, nodes: Sequence[ClusterNode], name: str, resources: Mapping[str, float]
) -> Any:
    """The placement group of a stage; Ray places it while the caller asks for the next one."""
    node = nodes[plan.ranks[stage * plan.tensor].node]
    bundles = [dict(resources) for _ in range(plan.tensor)]
    return placement_group(
        bundles,
        strategy="STRICT_PACK",
        name=f"{name}-stage-{stage}",
        bundle_label_selector=[{_NODE_ID_LABEL: node.id} for _ in bundles],
    )


def wait_for_stage(
    group: Any,
    plan: Plan,
    stage: int,
    nodes: Sequence[ClusterNode],
    resources: Mapping[str, float],
    deadline: float,
) -> None:
    """Until it is placed. deadline: in monotonic seconds, of the whole start.

    Raises:
        ClusterError: the node has no room, is gone, or the deadline is over.
    """
    limit = min(deadline, time.monotonic() + _PLACE_TIMEOUT_S)
    node = nodes[plan.ranks[stage * plan.tensor].node]
    while True:
        # whole seconds: Ray drops the fraction, and would not wait at all below one
        if group.wait(math.ceil(max(1.0, min(_LOOK_S, limit - time.monotonic())))):
            return
        if not any(each["NodeID"] == node.id and each["Alive"] for each in ray.nodes()):
            where = f"node {node.host} ({node.address})"
            raise ClusterError(f"Ray could not place stage {stage}: {where} has left the cluster")
        if time.monotonic() >= limit:
            break
    if time.monotonic() >= deadline:
        raise ClusterError(f"place: Ray had not placed stage {stage} before the deadline{_DEADLINE_HINT}")
    raise ClusterError(
        f"Ray could not place stage {stage}: it needs {plan.tensor} × {dict(resources)} on node {node.host} "
        f"({node.address}); free in the cluster: {ray.available_resources()}. Free or add resources, or lower "
        "parallel.tensor or .pipeline"
    )


def actor_options(plan: Plan, rank: RankPlan, group: Any, resources: Mapping[str, float]) -> dict[str, Any]:
    """Ray's options of a rank's actor, which takes its bundle whole."""
    return {
        "num_cpus": 1,
        "num_gpus": 1 if plan.device == "cuda" else 0,
        "resources": {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU", "memory")},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=rank.tp_rank
        ),
    }
