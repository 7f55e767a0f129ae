"""The executor on Ray: one actor per rank, control by actor calls, data by torch.distributed between them.

Implements the port `dist_infer.engine.executor.Executor`. One placement group per stage packs its tensor-parallel
ranks on the node of the plan; rank = stage × tensor + bundle index, never renumbered. A lost rank ends the gang, and
what took its place has an executor of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import remove_placement_group

from dist_infer.backend import OnStep, RankSpec
from dist_infer.gang_state import Connecting, Loading
from dist_infer.heartbeat import Heartbeat
from dist_infer.messages import StepPlan, StepResult, StreamReport, TimelineReport, WorkerReport, decode, encode
from dist_infer.worker.oom_watch import OomWatch
from launch.actors import RankActor
from launch.head_watch import HeadWatch
from launch.nodes import ClusterNode
from launch.placement import actor_options, ask_for_stage, rank_resources, wait_for_stage
from launch.runs.mark import first_line
from partition.errors import ClusterError, WorkerError

_LOOK_S = 0.5  # between looks at what is no rank's answer: progress, a loss that was found meanwhile
_NOTICE_S = 0.5  # a rank that is killed is often noticed by its peers first, as a lost connection
_REPORT_TIMEOUT_S = 30.0
_CLOSE_S = 5.0
_START_PHASES = ("start", "bind", "connect", "load")
_DEADLINE_HINT = " (cluster.start_timeout)"


class RayExecutor:
    """Owns the placement groups and actors of one gang."""

    def __init__(
        self,
        spec: RankSpec,
        *,
        name: str,
        nodes: tuple[ClusterNode, ...],
        start_timeout_s: float,
        heartbeat_timeout_s: float,
        on_step: OnStep,
        head: HeadWatch,
        node_resources: Mapping[str, float],
        interface: str | None,
    ) -> None:
        self._spec, self._name, self._nodes = spec, name, nodes
        self._resources = rank_resources(spec.plan, node_resources)
        self._head, self._interface = head, interface
        self._start_timeout_s, self._on_step = start_timeout_s, on_step
        self._groups: list[Any] = []
        self._actors: list[Any] = []
        self._steps: deque[tuple[int, list[Any]]] = deque()
        self._ending = threading.Lock()  # guards the next, and what is in the two lists above when it turns true
        self._closed = False
        self._silence_s = heartbeat_timeout_s
        self._heartbeat = Heartbeat(self._ask_hearts, self._silent, timeout_s=heartbeat_timeout_s)
        self._beats: dict[int, Any] = {}  # by rank, on their way; the heartbeat's thread alone
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
            self._on_step(Connecting())
            if len(self._actors) > 1:
                ((host, port),) = self._all("bind", [self._actors[0].bind.remote()], deadline)
                self._all("connect", [actor.connect.remote(host, port) for actor in self._actors], deadline)
            loads = [actor.load.remote() for actor in self._actors]
            reports = self._all("load", loads, deadline, self._show_progress)
        except BaseException:
            self.close()
            raise
        return tuple(decode(WorkerReport, report) for report in reports)

    def watch(self, on_loss: Callable[[ClusterError], None]) -> None:
        with self._ending:
            if not self._closed:
                self._heartbeat.start(on_loss)

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
        with self._ending:
            if self._closed:
                return
            self._closed = True
        self._heartbeat.stop()
        # while the head is silent that waits for it: those on a node that was cut off must not stay
        ending = threading.Thread(target=self._end_all, name="dist-infer-end-ranks", daemon=True)
        ending.start()
        ending.join(_CLOSE_S)
        self._steps.clear()
        self._heartbeat.join()

    def _end_all(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)
        if self._head.is_lost:
            return  # they end with it
        try:
            self._head.wait_for_answer()
        except ClusterError:
            return
        for group in self._groups:
            with contextlib.suppress(RayError, ValueError):
                remove_placement_group(group)

    def _ask_hearts(self, timeout_s: float) -> list[int]:
        """See `Heartbeat`. The answer is a thread's of the actor that does nothing else."""
        self._head.raise_if_lost()
        for rank, actor in enumerate(self._actors):
            if rank not in self._beats:
                self._beats[rank] = actor.beat.remote()
        rank_of = {ref: rank for rank, ref in self._beats.items()}
        for ref in ray.wait(list(rank_of), num_returns=len(rank_of), timeout=timeout_s)[0]:
            del self._beats[rank_of[ref]]
            self._raise_if_failed("heartbeat", rank_of[ref], ref)
        return list(self._beats)

    def _silent(self, ranks: Sequence[int]) -> WorkerError:
        return WorkerError(
            f"rank {', '.join(map(str, ranks))} has not answered for {self._silence_s:g} s (cluster.heartbeat_timeout)",
            rank=ranks[0],
        )

    def _place(self, deadline: float) -> None:
        plan = self._spec.plan
        for stage in range(plan.pipeline):
            with self._unless_closed():
                self._groups.append(ask_for_stage(plan, stage, self._nodes, self._group_name, self._resources))
        for stage, group in enumerate(self._groups):
            wait_for_stage(group, plan, stage, self._nodes, self._resources, deadline)

    def _create(self) -> None:
        plan = self._spec.plan
        for rank in plan.ranks:
            options = actor_options(plan, rank, self._groups[rank.stage], self._resources)
            # Ray shows each actor only its own GPU
            setup = self._spec.setup((rank.rank,), ("cuda:0" if plan.device == "cuda" else "cpu",), rank.threads)
            line = first_line(self._name, f"rank {rank.rank}")
            with self._unless_closed():
                actor = RankActor.options(**options).remote(encode(setup), self._interface, line)  # type: ignore[attr-defined]
                self._actors.append(actor)

    @contextlib.contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """What is made within, `close` ends."""
        with self._ending:
            if self._closed:
                raise ClusterError("the executor was closed")
            yield

    @property
    def _group_name(self) -> str:
        """Ray wants another for each gang: the name of one that is being removed is not free yet."""
        return f"{self._name}-gang-{self._spec.epoch}" if self._spec.epoch else self._name

    def _all(self, what: str, refs: list[Any], deadline: float, waiting: Callable[[], None] | None = None) -> list[Any]:
        """The answers of all ranks in their order; the first error or death among them ends the wait."""
        pending, rank_of = list(refs), {ref: rank for rank, ref in enumerate(refs)}
        while pending:
            left = deadline - time.monotonic()
            if left <= 0:
                silent = ", ".join(str(rank_of[ref]) for ref in pending)
                hint = _DEADLINE_HINT if what in _START_PHASES else " (engine.step_timeout)"
                raise ClusterError(f"{what}: no answer from rank {silent} before the deadline{hint}")
            ready, pending = ray.wait(pending, timeout=min(left, _LOOK_S))
            if waiting is not None:
                waiting()
            if self._heartbeat.error is not None:
                raise self._heartbeat.error
            self._head.raise_if_lost()
            for ref in ready:
                self._raise_if_failed(what, rank_of[ref], ref, {ref: rank_of[ref] for ref in pending})
        answers: list[Any] = ray.get(refs)
        return answers

    def _raise_if_failed(self, what: str, rank: int, ref: Any, others: Mapping[Any, int] | None = None) -> None:
        """others: who is waited for, too, by rank: if one of them has died, that is the cause."""
        try:
            ray.get(ref)
        except RayTaskError as error:
            for other in ray.wait(list(others), num_returns=len(others), timeout=_NOTICE_S)[0] if others else []:
                self._raise_if_dead(what, (others or {})[other], other)
            cause = error.cause if error.cause is not None else error
            why = str(cause) if isinstance(cause, ClusterError) else f"{type(cause).__name__}: {cause}"
            raise WorkerError(f"{what}: rank {rank} failed: {why}{self._memory_of(rank)}", rank=rank) from error
        except RayActorError as error:
            raise self._death(what, rank, error) from error
        except RayError as error:
            raise ClusterError(f"{what}: rank {rank}: {_brief(error)}") from error

    def _raise_if_dead(self, what: str, rank: int, ref: Any) -> None:
        try:
            ray.get(ref)
        except RayActorError as error:
            raise self._death(what, rank, error) from error
        except RayError:
            return  # one more that has noticed

    def _death(self, what: str, rank: int, error: RayActorError) -> WorkerError:
        return WorkerError(f"{what}: rank {rank} died: {_brief(error).rstrip('.')}{self._memory_of(rank)}", rank=rank)

    def _memory_of(self, rank: int) -> str:
        """Whether memory ran out, known of this node alone: on others Ray says what it knows."""
        here = self._nodes[self._spec.plan.ranks[rank].node].is_here
        return self._memory.explain() if here else ""

    def _show_progress(self) -> None:
        try:
            counts = ray.get([actor.progress.remote() for actor in self._actors], timeout=_LOOK_S)
        except (GetTimeoutError, RayError):
            return  # the load itself reports what is wrong
        plans = self._spec.plan.ranks
        total = sum(unit.tier != "nvme" or unit.kept_bytes > 0 for rank in plans for unit in rank.units)
        self._on_step(Loading(done=sum(done for done, _ in counts), total=total))


def _brief(error: BaseException) -> str:
    """Ray's message without the trace in its middle and its guesses: what happened, and the error raised last."""
    lines = [line.strip().partition(" Some common causes")[0] for line in str(error).splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
