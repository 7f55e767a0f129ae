"""Packing on a Ray cluster: every node packs what its ranks own, all of them at once, from its view of the checkpoint.

probe    each node: the checkpoint is the coordinator's; what is missing here?      nothing anywhere: done
seen     nodes that miss something: who sees whose mark, that is, shares a store?
pack     one node of each store, everything that its sharers miss, once
store    each node: is all there now, as I see it?
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dist_infer.messages import decode, encode
from dist_infer.node_store import NodeStore, PackOrder, PackProgress, share_groups
from launch.nodes import ClusterNode
from launch.pack_actor import PackActor, Probe
from partition.errors import ClusterError, DistInferError

_PROGRESS_INTERVAL_S = 0.5


def pack_on_nodes(
    order: PackOrder, nodes: Sequence[ClusterNode], progress: PackProgress, *, silence_s: float
) -> dict[int, NodeStore]:
    """Bring every node of the order to hold its units; what it has then, by node. silence_s: without any progress.

    Raises:
        DistInferError: of the kind that a node raised, naming the node; ClusterError when one is lost or silent.
    """
    packing = _Packing(order, nodes, progress, silence_s)
    try:
        return packing.run()
    finally:
        packing.close()


class _Packing:
    """One run of it. Owns an actor on each node."""

    def __init__(
        self, order: PackOrder, nodes: Sequence[ClusterNode], progress: PackProgress, silence_s: float
    ) -> None:
        self._order, self._nodes, self._progress, self._silence_s = order, nodes, progress, silence_s
        mark = secrets.token_hex(8)
        self._marks = {node: f"mark-{mark}-{node}" for node in order.units}
        data = encode(order)
        self._actors: dict[int, Any] = {}
        for node in order.units:
            pinned = NodeAffinitySchedulingStrategy(nodes[node].id, soft=False)
            options = PackActor.options(scheduling_strategy=pinned)  # type: ignore[attr-defined]
            self._actors[node] = options.remote(data, node)

    def run(self) -> dict[int, NodeStore]:
        probed = self._all({node: actor.probe.remote(self._marks[node]) for node, actor in self._actors.items()})
        probes = {node: decode(Probe, data) for node, data in probed.items()}
        found = {node: probe.complete for node, probe in probes.items() if probe.complete is not None}
        missing = [node for node in self._actors if node not in found]
        if not missing:
            return found
        marks = {node: self._marks[node] for node in missing}
        seen = self._all({node: self._actors[node].seen.remote(marks) for node in missing})
        jobs = {group[0]: self._units_of(group) for group in share_groups(seen)}
        packed = self._all(
            {node: self._actors[node].pack.remote(list(units)) for node, units in jobs.items()}, self._show
        )
        for node, data in packed.items():
            found[node] = decode(NodeStore, data)
        others = [node for node in missing if node not in packed]
        stores = self._all({node: self._actors[node].store.remote() for node in others})
        for node, data in stores.items():
            found[node] = replace(decode(NodeStore, data), num_reused=0)  # they count where they were packed
        return dict(sorted(found.items()))

    def close(self) -> None:
        """End the actors; what they have finished packing stays. Idempotent."""
        for actor in self._actors.values():
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)

    def _units_of(self, group: Sequence[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for node in group for name in self._order.units[node]))

    def _all(self, refs: Mapping[int, Any], waiting: Callable[[Sequence[int]], object] | None = None) -> dict[int, Any]:
        """The answers by node. The first error ends the wait, and so does silence: no answer and no progress."""
        node_of = {ref: node for node, ref in refs.items()}
        pending, noted, deadline = list(node_of), None, time.monotonic() + self._silence_s
        while pending:
            left = deadline - time.monotonic()
            if left <= 0:
                silent = ", ".join(self._nodes[node_of[ref]].host for ref in pending)
                hint = "cluster.start_timeout"
                raise ClusterError(f"packing: nothing new from {silent} for {self._silence_s:g} s ({hint})")
            ready, pending = ray.wait(pending, timeout=min(left, _PROGRESS_INTERVAL_S) if waiting else left)
            for ref in ready:
                self._raise_if_failed(node_of[ref], ref)
            note = waiting(list(refs)) if waiting else None
            if ready or note != noted:
                noted, deadline = note, time.monotonic() + self._silence_s
        return {node: ray.get(ref) for node, ref in refs.items()}

    def _show(self, nodes: Sequence[int]) -> object:
        """Tell how far the nodes are; what they said, to be compared."""
        try:
            said = ray.get([self._actors[node].progress.remote() for node in nodes], timeout=_PROGRESS_INTERVAL_S)
        except (GetTimeoutError, RayError):
            return None  # the packing itself reports what is wrong
        busy = [
            f"{self._nodes[node].host}: {detail}"
            for node, (done, total, detail) in zip(nodes, said, strict=True)
            if detail and done < total
        ]
        if any(total for _, total, _ in said):
            self._progress(sum(done for done, _, _ in said), sum(total for _, total, _ in said), "; ".join(busy))
        return said

    def _raise_if_failed(self, node: int, ref: Any) -> None:
        where = f"node {self._nodes[node].host}"
        try:
            ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, DistInferError):
                raise type(cause)(f"{where}: {cause}") from error
            cause = cause or error
            raise ClusterError(f"packing on {where} failed: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            lines = str(error).strip().splitlines()
            raise ClusterError(f"packing on {where}: its process died: {lines[0] if lines else error}") from error
        except RayError as error:
            raise ClusterError(f"packing on {where}: {error}") from error
