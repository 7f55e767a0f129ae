"""Where ranks run: the port a kind of cluster implements, and this machine's implementation.

`cluster.executor` names it. `local` is here; others are found by the entry point group `dist_infer.executors`, so that
nothing in this package knows Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, Protocol

from dist_infer.config import ClusterConfig
from dist_infer.config_types import ReaderKind
from dist_infer.engine.executor import Executor
from dist_infer.gang_state import Step
from dist_infer.node_store import NodeStore, PackHere, PackOrder, PackProgress
from dist_infer.worker.setup import StoreLocation, WorkerSetup
from offload.machine import cores
from partition.errors import ConfigError
from partition.hardware import HardwareFacts
from partition.plan import Plan, plan_to_json

OnStep = Callable[[Step], None]
ENTRY_POINTS = "dist_infer.executors"
# Resident memory of a process with torch and transformers loaded and nothing of ours allocated, measured with
# benchmarks/footprint.py; the planner keeps it out of the budgets.
PROCESS_FOOTPRINT_BYTES = 400 << 20


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of the processes themselves: per rank, and of the coordinator with what it starts."""

    rank_bytes: int
    launcher_bytes: int


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """What all ranks of a run have in common; `setup` adds what differs. By node: its store, and what reads that."""

    plan: Plan
    config_json: str
    stores: Mapping[int, StoreLocation]
    verify: Literal["first", "always", "never"]
    readers: tuple[str, ...]
    step_timeout_s: float
    timeline: bool = False
    epoch: int = 0

    def setup(self, ranks: tuple[int, ...], devices: tuple[str, ...], threads: int) -> WorkerSetup:
        return WorkerSetup(
            plan_json=plan_to_json(self.plan),
            config_json=self.config_json,
            ranks=ranks,
            store=self.stores[self.plan.ranks[ranks[0]].node],
            devices=devices,
            verify=self.verify,
            reader=self.readers[self.plan.ranks[ranks[0]].node],
            threads=threads,
            step_timeout_s=self.step_timeout_s,
            timeline=self.timeline,
            epoch=self.epoch,
        )


class Backend(Protocol):
    """A kind of cluster. Made from the cluster section; `close` releases what it started, on every path."""

    def facts(
        self,
        *,
        with_devices: bool,
        sample: Mapping[int, Path] | None,
        dtype: str | None,
        reader: ReaderKind = "threads",
    ) -> HardwareFacts:
        """What the nodes have. sample (a large file of the store, by node), dtype: measure the store's disk (with
        `reader`) and the compute rate instead of assuming."""
        ...

    def pack(self, order: PackOrder, here: PackHere, progress: PackProgress) -> Mapping[int, NodeStore]:
        """Each node of the order gets its own units into its own store. here: does so on this machine.

        Raises the tree's errors with the node that failed.
        """
        ...

    def footprint(self, tensor: int, pipeline: int) -> Footprint: ...

    def executor(self, spec: RankSpec, on_step: OnStep) -> Executor: ...

    def drop_lost_nodes(self, plan: Plan, ended: Mapping[int, Sequence[int]]) -> tuple[str, ...]:
        """The names of the plan's nodes that are gone or silent; facts asked for after this are of others.

        plan: of the last facts; without lost nodes it still fits. ended: by node, the processes of ranks that were
        killed; waits a moment for them to be gone, as their memory is wanted. Raises ClusterError when the cluster does
        not answer.
        """
        ...

    def computes_here(self, plan: Plan) -> bool:
        """Whether this plan's ranks live in the coordinator's process."""
        ...

    def close(self) -> None: ...


class LocalBackend:
    """This machine, without Ray. apart: also a single rank has a process of its own."""

    def __init__(self, config: ClusterConfig, *, apart: bool = False) -> None:
        self._config, self._apart = config, apart

    def facts(
        self,
        *,
        with_devices: bool,
        sample: Mapping[int, Path] | None,
        dtype: str | None,
        reader: ReaderKind = "threads",
    ) -> HardwareFacts:
        from dist_infer.machine import machine_facts

        found = machine_facts(with_devices=with_devices, sample=(sample or {}).get(0), dtype=dtype, reader=reader)
        return HardwareFacts(nodes=(found,))

    def pack(self, order: PackOrder, here: PackHere, progress: PackProgress) -> Mapping[int, NodeStore]:
        return {0: here(order.units[0])}

    def footprint(self, tensor: int, pipeline: int) -> Footprint:
        """One process for the coordinator; apart or with tensor > 1 one more per tensor rank, shared by its stages."""
        rank_bytes = PROCESS_FOOTPRINT_BYTES // pipeline if tensor > 1 or self._apart else 0
        return Footprint(rank_bytes=rank_bytes, launcher_bytes=PROCESS_FOOTPRINT_BYTES)

    def executor(self, spec: RankSpec, on_step: OnStep) -> Executor:
        plan, timeout = spec.plan, self._config.start_timeout
        # Stages of one process compute one after the other: each may use what its process may use.
        threads = min(max(rank.threads for rank in plan.ranks) * plan.pipeline, max(1, cores() // plan.tensor))
        if self.computes_here(plan):
            from dist_infer.worker.in_process_executor import InProcessExecutor

            ranks = tuple(range(plan.pipeline))
            setup = spec.setup(ranks, _devices(plan, ranks), threads)
            return InProcessExecutor(setup, start_timeout_s=timeout, on_step=on_step)
        from dist_infer.worker.local_executor import SpawnedExecutor

        setups = []
        for tp_rank in range(plan.tensor):
            ranks = tuple(stage * plan.tensor + tp_rank for stage in range(plan.pipeline))
            setups.append(spec.setup(ranks, _devices(plan, ranks), threads))
        return SpawnedExecutor(
            setups,
            start_timeout_s=timeout,
            heartbeat_timeout_s=self._config.heartbeat_timeout,
            on_step=on_step,
        )

    def drop_lost_nodes(self, plan: Plan, ended: Mapping[int, Sequence[int]]) -> tuple[str, ...]:
        return ()  # and its executors wait for their processes

    def computes_here(self, plan: Plan) -> bool:
        return plan.tensor == 1 and not self._apart

    def close(self) -> None:
        """Nothing outlives the executor."""


def _devices(plan: Plan, ranks: tuple[int, ...]) -> tuple[str, ...]:
    """On one machine rank r computes on GPU r."""
    return tuple(f"cuda:{rank}" if plan.device == "cuda" else "cpu" for rank in ranks)


def make_backend(config: ClusterConfig, name: str, *, apart: bool = False) -> Backend:
    """The backend that `cluster.executor` names. name: the run's, for what shows up in the cluster's own tools.

    apart: no rank in this process.
    """
    if config.executor == "local":
        return LocalBackend(config, apart=apart)
    for found in entry_points(group=ENTRY_POINTS, name=config.executor):
        try:
            kind = found.load()
        except ImportError as error:
            raise ConfigError(
                f"cluster.executor: {config.executor} needs a package that is not installed ({error}); "
                f"`pip install 'dist-infer[{config.executor}]'`, or use cluster.executor: local"
            ) from error
        backend: Backend = kind(config, name)
        return backend
    raise ConfigError(
        f"cluster.executor: {config.executor} is not available: dist-infer is not installed as a package here "
        "(`pip install .`); cluster.executor: local works without"
    )
