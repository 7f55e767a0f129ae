"""Who packs what: each node the units that its ranks own, into a store of its own.

Plain data, JSON where it crosses processes. A store's key contains the fingerprint of the checkpoint as that node sees
it, so copies with other modification times have stores of other names; `content` says whether they are copies at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dist_infer.worker.setup import StoreLocation
from partition.plan import Plan

if TYPE_CHECKING:  # it imports torch, which a plan does not need
    from offload.pack import PackReport


@dataclass(frozen=True, slots=True)
class PackOrder:
    """What the nodes are to have. `config_json`: the run file, which every node reads its own checkpoint by.

    `content`: of the coordinator's checkpoint; a node whose own differs packs nothing. `units`: names by node.
    """

    config_json: str
    content: str
    units: dict[int, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class NodeStore:
    """What a node has after packing: its store, the largest of its blobs, and what that took."""

    location: StoreLocation
    sample: str
    num_written: int
    num_reused: int
    bytes_written: int
    seconds: float

    def after(self, before: NodeStore | None) -> NodeStore:
        """As the sum of two rounds on one node, the second for a plan that differs."""
        if before is None:
            return self
        written = self.num_written + before.num_written
        return replace(
            self,
            num_written=written,
            num_reused=max(0, self.num_reused - before.num_written),
            bytes_written=self.bytes_written + before.bytes_written,
            seconds=self.seconds + before.seconds,
        )


PackHere = Callable[[tuple[str, ...]], NodeStore]
"""Packs units on this machine, showing its own progress. Raises the tree's errors."""

PackProgress = Callable[[int, int, str], None]
"""Blobs done, of how many, over all nodes; and what was done last."""


def units_by_node(plan: Plan) -> dict[int, tuple[str, ...]]:
    """The units of each node that has ranks, in order of use. All tensor ranks of a stage are on one node."""
    found: dict[int, dict[str, None]] = {}
    for rank in plan.ranks:
        found.setdefault(rank.node, {}).update(dict.fromkeys(unit.name for unit in rank.units))
    return {node: tuple(names) for node, names in sorted(found.items())}


def sum_reports(stores: Iterable[NodeStore]) -> PackReport:
    """Of all nodes: they pack side by side, so seconds are those of the slowest."""
    from offload.pack import PackReport

    found = list(stores)
    return PackReport(
        num_written=sum(store.num_written for store in found),
        num_reused=sum(store.num_reused for store in found),
        bytes_written=sum(store.bytes_written for store in found),
        seconds=max((store.seconds for store in found), default=0.0),
    )


def share_groups(seen: Mapping[int, Iterable[int]]) -> list[tuple[int, ...]]:
    """Nodes that see each other's marks in their store, in groups of one store each. seen[n]: whose marks n sees."""
    groups: list[tuple[int, ...]] = []
    grouped: set[int] = set()
    for node, others in sorted(seen.items()):
        if node in grouped:
            continue
        group = tuple(sorted({node, *(other for other in others if other in seen and node in set(seen[other]))}))
        group = tuple(other for other in group if other not in grouped)
        grouped |= set(group)
        groups.append(group)
    return groups
