"""The executor on Ray: one actor per rank, control by actor calls, data by torch.distributed between them.

Implements the port `dist_infer.engine.executor.Executor`. One placement group per stage packs its tensor-parallel
ranks on one node; rank = stage × tensor + bundle index, never renumbered. A lost rank ends the gang.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dist_infer.backend import RankSpec
from dist_infer.messages import StepPlan, StepResult, StreamReport, TimelineReport, WorkerReport, decode, encode
from dist_infer.worker.oom_watch import OomWatch
from launch.actors import RankActor
from partition.errors import ClusterError, WorkerError

_PROGRESS_INTERVAL_S = 0.5
_REPORT_TIMEOUT_S = 30.0
_START_PHASES = ("start", "bind", "connect", "load")
_DEADLINE_HINT = " (cluster.start_timeout)"
_PLACE_TIMEOUT_S = 30.0  # placing takes milliseconds when there is room; waiting longer only hides that there is none


class RayExecutor:
    """Owns the placement groups and actors of one gang."""

    def __init__(
        self,
        spec: RankSpec,
        *,
        name: str,
        node_addresses: tuple[str, ...],
        start_timeout_s: float,
        progress: Callable[[int, int], None],
    ) -> None:
        self._spec, self._name, self._nodes = spec, name, node_addresses
        self._start_timeout_s, self._progress = start_timeout_s, progress
        self._groups: list[Any] = []
        self._actors: list[Any] = []
        self._steps: deque[tuple[int, list[Any]]] = deque()
        self._closed = False
        self._asking = threading.Lock()  # guards the two below, by rank
        self._asked: dict[int, Any] = {}  # reports on their way
        self._reports: dict[int, StreamReport] = {}  # the last that are known
        self._memory = OomWatch()

    def start(self) -> tuple[WorkerReport, ...]:
        """Place, start, connect and load all ranks within the start deadline, or raise with nothing left behind."""
        deadline = time.monotonic() + self._start_timeout_s
        try:
            self._place(deadline)
            self._create()
            self._all("start", [actor.whoami.remote() for actor in self._actors], deadline)
            if len(self._actors) > 1:
                ((host, port),) = self._all("bind", [self._actors[0].bind.remote()], deadline)
                self._all("connect", [actor.connect.remote(host, port) for actor in self._actors], deadline)
            loads = [actor.load.remote() for actor in self._actors]
            reports = self._all("load", loads, deadline, self._show_progress)
        except BaseException:
            self.close()
            raise
        return tuple(decode(WorkerReport, report) for report in reports)

    def submit(self, plan: StepPlan) -> None:
        data = encode(plan)
        self._steps.append((plan.step_id, [actor.step.remote(data) for actor in self._actors]))

    def collect(self, timeout_s: float) -> StepResult:
        if not self._steps:
            raise ClusterError("the executor was closed")
        step_id, refs = self._steps[0]
        answers = self._all(f"step {step_id}", refs, time.monotonic() + timeout_s)
        self._steps.popleft()
        return decode(StepResult, next(answer for answer in answers if answer))

    def stream_reports(self, timeout_s: float = _REPORT_TIMEOUT_S) -> tuple[StreamReport, ...]:
        deadline = time.monotonic() + timeout_s
        if self._asking.acquire(timeout=timeout_s):
            try:
                self._take_reports(deadline)
            finally:
                self._asking.release()
        return tuple(report for _, report in sorted(self._reports.items()))

    def _take_reports(self, deadline: float) -> None:
        """What comes in time. A rank that is late is not asked again: its answer counts when it comes."""
        for rank, actor in enumerate(self._actors):
            if rank not in self._asked:
                self._asked[rank] = actor.stream_report.remote()
        rank_of = {ref: rank for rank, ref in self._asked.items()}
        left = max(0.0, deadline - time.monotonic())
        for ref in ray.wait(list(rank_of), num_returns=len(rank_of), timeout=left)[0] if rank_of else []:
            rank = rank_of[ref]
            del self._asked[rank]
            self._raise_if_failed("report", rank, ref)
            self._reports[rank] = decode(StreamReport, ray.get(ref))

    def timelines(self) -> tuple[TimelineReport, ...]:
        refs = [actor.timeline.remote() for actor in self._actors]
        found = self._all("timeline", refs, time.monotonic() + 30)
        return tuple(decode(TimelineReport, data) for data in found if data)

    def close(self) -> None:
        """Kill the actors and give the placement groups back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for actor in self._actors:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)
        for group in self._groups:
            with contextlib.suppress(RayError, ValueError):
                remove_placement_group(group)
        self._steps.clear()

    def _place(self, deadline: float) -> None:
        plan = self._spec.plan
        resources: dict[str, float] = {"CPU": 1.0} | ({"GPU": 1.0} if plan.device == "cuda" else {})
        for stage in range(plan.pipeline):
            address = self._nodes[plan.ranks[stage * plan.tensor].node]
            # Ray's own per-node resource ties the stage to the node it was planned for.
            bundles = [{**resources, f"node:{address}": 0.001} for _ in range(plan.tensor)]
            self._groups.append(placement_group(bundles, strategy="STRICT_PACK", name=f"{self._name}-stage-{stage}"))
        for stage, group in enumerate(self._groups):
            # whole seconds: Ray drops the fraction, and would not wait at all below one
            if not group.wait(math.ceil(max(1.0, min(_PLACE_TIMEOUT_S, deadline - time.monotonic())))):
                if time.monotonic() >= deadline:
                    raise ClusterError(f"place: Ray had not placed stage {stage} before the deadline{_DEADLINE_HINT}")
                raise ClusterError(
                    f"Ray could not place stage {stage}: it needs {plan.tensor} × {resources} on node "
                    f"{self._nodes[plan.ranks[stage * plan.tensor].node]}; free in the cluster: "
                    f"{ray.available_resources()}. Free or add resources, or lower parallel.tensor or .pipeline"
                )

    def _create(self) -> None:
        plan = self._spec.plan
        for rank in plan.ranks:
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=self._groups[rank.stage], placement_group_bundle_index=rank.tp_rank
            )
            options = {"num_cpus": 1, "num_gpus": 1 if plan.device == "cuda" else 0, "scheduling_strategy": strategy}
            # Ray shows each actor only its own GPU
            setup = self._spec.setup((rank.rank,), ("cuda:0" if plan.device == "cuda" else "cpu",), rank.threads)
            self._actors.append(RankActor.options(**options).remote(encode(setup)))  # type: ignore[attr-defined]

    def _all(self, what: str, refs: list[Any], deadline: float, waiting: Callable[[], None] | None = None) -> list[Any]:
        """The answers of all ranks in their order; the first error or death among them ends the wait."""
        pending, rank_of = list(refs), {ref: rank for rank, ref in enumerate(refs)}
        while pending:
            left = deadline - time.monotonic()
            if left <= 0:
                silent = ", ".join(str(rank_of[ref]) for ref in pending)
                hint = _DEADLINE_HINT if what in _START_PHASES else " (engine.step_timeout)"
                raise ClusterError(f"{what}: no answer from rank {silent} before the deadline{hint}")
            ready, pending = ray.wait(pending, timeout=min(left, _PROGRESS_INTERVAL_S) if waiting else left)
            if waiting is not None:
                waiting()
            for ref in ready:
                self._raise_if_failed(what, rank_of[ref], ref)
        answers: list[Any] = ray.get(refs)
        return answers

    def _raise_if_failed(self, what: str, rank: int, ref: Any) -> None:
        try:
            ray.get(ref)
        except RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            words = f"{what}: rank {rank} failed: {type(cause).__name__}: {cause}{self._memory_of(rank)}"
            raise WorkerError(words, rank=rank) from error
        except RayActorError as error:
            words = f"{what}: rank {rank} died: {_brief(error).rstrip('.')}{self._memory_of(rank)}"
            raise WorkerError(words, rank=rank) from error
        except RayError as error:
            raise ClusterError(f"{what}: rank {rank}: {_brief(error)}") from error

    def _memory_of(self, rank: int) -> str:
        """Whether memory ran out, known of this node alone: on others Ray says what it knows."""
        here = self._nodes[self._spec.plan.ranks[rank].node] == ray.util.get_node_ip_address()
        return self._memory.explain() if here else ""

    def _show_progress(self) -> None:
        try:
            counts = ray.get([actor.progress.remote() for actor in self._actors], timeout=_PROGRESS_INTERVAL_S)
        except (GetTimeoutError, RayError):
            return  # the load itself reports what is wrong
        plans = self._spec.plan.ranks
        total = sum(unit.tier != "nvme" or unit.kept_bytes > 0 for rank in plans for unit in rank.units)
        self._progress(sum(done for done, _ in counts), total)


def _brief(error: BaseException) -> str:
    """Ray's message without the trace in its middle: what happened, and the error that was raised last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
