"""One node's part in packing, in a process on that node. JSON goes in and comes out, never an object of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from dist_infer.messages import decode, encode
from dist_infer.node_store import NodeStore, PackOrder
from launch.root_guard import check_one_root
from partition.errors import CheckpointError, StoreError

if TYPE_CHECKING:
    from dist_infer.startup import Progress


@dataclass(frozen=True, slots=True)
class Probe:
    """Where a node's store lies, and what it has where nothing is missing."""

    directory: str
    complete: NodeStore | None


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, max_concurrency=1, concurrency_groups={"control": 1})
class PackActor:
    """Opens the checkpoint as its node sees it; `probe` first, the rest as the coordinator finds necessary."""

    def __init__(self, order: bytes, node: int) -> None:
        check_one_root()
        from dist_infer.config import load_config

        self._order = decode(PackOrder, order)
        self._own = self._order.units[node]
        self._config = load_config(json.loads(self._order.config_json))
        self._progress = (0, 0, "")

    def probe(self, mark: str) -> bytes:
        """A Probe. Leaves `mark` in a store that is not complete. Raises CheckpointError for another checkpoint."""
        from dist_infer.startup import open_model, store_location
        from offload.store_marks import leave_mark

        self._model = open_model(self._config)
        if self._model.index.content != self._order.content:
            raise CheckpointError(
                f"the checkpoint at {self._model.path} is not the coordinator's (other config, files or weights): copy "
                "it again"
            )
        self._directory = Path(store_location(self._config, self._model).directory)
        complete = self._complete()
        if complete is None:
            leave_mark(self._directory, mark)
        return encode(Probe(str(self._directory), complete))

    def seen(self, marks: dict[int, str]) -> list[int]:
        """The nodes whose marks are in this node's store: it is theirs, too."""
        from offload.store_marks import sees_mark

        return [node for node, mark in marks.items() if sees_mark(self._directory, mark)]

    def pack(self, units: list[str]) -> bytes:
        """Pack these units into this node's store; a NodeStore of them."""
        import torch

        from dist_infer.startup import pack_units
        from offload.machine import cores

        torch.set_num_threads(cores())  # Ray allows one where no CPU is set aside
        return encode(pack_units(self._config, self._model, units, self._note))

    def store(self) -> bytes:
        """What this node has of its own, packed by another. Raises StoreError when something is missing."""
        found = self._complete()
        if found is None:
            raise StoreError(f"{self._directory} was packed by another node, but is not complete as this one sees it")
        return encode(found)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def progress(self) -> tuple[int, int, str]:
        """(blobs done, blobs to have, what was done last) of `pack`."""
        return self._progress

    def _complete(self) -> NodeStore | None:
        """Of this node's own units, if all are there; reads no weights."""
        from dist_infer.startup import find_units

        return find_units(self._config, self._model, self._own)

    def _note(self, progress: Progress) -> None:
        self._progress = (progress.done, progress.total, progress.detail)
