"""Which nodes of a cluster are gone: those that Ray has given up, and those that do not answer though it has not."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import psutil

from launch.nodes import ClusterNode
from partition.errors import ClusterError

_ANSWER_S = 10.0  # a busy node has to start a process first; one that is cut off keeps us no longer
_END_S = 5.0  # for killed ranks to be gone: much memory takes the kernel a while


def find_lost(nodes: Mapping[ClusterNode, Sequence[int]]) -> tuple[ClusterNode, ...]:
    """Of these, in their order; each answers when those processes of its own are gone.

    Raises ClusterError when Ray itself does not answer.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        task = ray.remote(num_cpus=0, max_retries=0)(_answer)
        asked = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(ended): node
            for node, ended in nodes.items()
            if node.id in alive and not node.is_here
        }
        there = {node.id for node in nodes if node.id in alive and node.is_here}
        wait_for_ends([pid for node, ended in nodes.items() if node.is_here for pid in ended])
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


def wait_for_ends(pids: Sequence[int]) -> None:
    """Of processes of this machine that were killed, for a moment: planning wants their memory."""
    left = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(psutil.Process(pid))
    psutil.wait_procs(left, timeout=_END_S)


def _answer(ended: Sequence[int]) -> None:
    """That the node runs anything at all is what is asked."""
    wait_for_ends(ended)
