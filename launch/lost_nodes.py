"""Which nodes of a cluster are gone: those that Ray has given up, and those that do not answer though it has not."""

from __future__ import annotations

from collections.abc import Sequence

from launch.nodes import ClusterNode
from partition.errors import ClusterError

_ANSWER_S = 10.0  # a busy node has to start a process first; one that is cut off keeps us no longer


def find_lost(nodes: Sequence[ClusterNode]) -> tuple[ClusterNode, ...]:
    """Of these, in their order. Raises ClusterError when Ray itself does not answer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        task = ray.remote(num_cpus=0, max_retries=0)(_answer)
        asked = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(): node
            for node in nodes
            if node.id in alive and not node.is_here
        }
        there = {node.id for node in nodes if node.id in alive and node.is_here}
        ready, pending = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
    except (RayError, ConnectionError, RuntimeError) as error:
        raise ClusterError(f"Ray does not say which nodes there are: {error}") from error
    for ref in ready:
        try:
            ray.get(ref)
        except RayError:
            continue  # it went while it was asked
        there.add(asked[ref].id)
    for ref in pending:
        ray.cancel(ref, force=True)
    return tuple(node for node in nodes if node.id not in there)


def _answer() -> None:
    """That the node runs anything at all is what is asked."""
