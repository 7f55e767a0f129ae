"""The ranks that live in one process: a single rank (Ray), or every stage of one tensor rank (local executor)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch
from torch._C._distributed_c10d import TCPStore

from dist_infer.messages import StepPlan, StepResult, StreamReport, TimelineReport, WorkerReport
from dist_infer.openmp import release_pool
from dist_infer.worker import collectives
from dist_infer.worker.pass_log import PassLog
from dist_infer.worker.setup import WorkerSetup
from dist_infer.worker.stage_link import StageLink
from dist_infer.worker.stage_runner import StageRunner
from partition.errors import ClusterError
from partition.plan import Plan, plan_from_json

_NUM_NAMED = 8  # requests in an error's words


class RankHost:
    """Owns the stage runners of its ranks and their part in torch.distributed. Steps come in order, one at a time.

    With one process for the whole model there is nothing to connect; otherwise rank 0 of the world calls `bind`, all
    call `connect` with what it returned, then `load`.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        torch.set_num_threads(setup.threads)
        self._setup = setup
        self._plan: Plan = plan_from_json(setup.plan_json)
        self._alone = len(setup.ranks) == len(self._plan.ranks)
        self._hosts_all_stages = len(setup.ranks) == self._plan.pipeline
        self._group: collectives.NoGroup | collectives.TensorGroup = collectives.NoGroup()
        self._link: StageLink | None = None
        self._store: TCPStore | None = None
        self._stages: list[StageRunner] = []
        self._logs: dict[int, PassLog] = {}  # by rank; empty unless a timeline is recorded

    def bind(self, host: str) -> int:
        """On the first process of the world: bind a free port and return it."""
        store, port = collectives.bind_rendezvous(host, self._world_size, self._setup.step_timeout_s)
        self._store = store
        return port

    def connect(self, host: str, port: int, own_host: str) -> None:
        """Join the others at rank 0's host and port. Raises ClusterError at the timeout."""
        first = self._plan.ranks[self._setup.ranks[0]]
        rank = first.tp_rank if self._hosts_all_stages else first.rank
        store = self._store or collectives.join_rendezvous(host, port, self._world_size, self._setup.step_timeout_s)
        self._store = store
        self._group, self._link = collectives.connect(
            store=store,
            own_host=own_host,
            rank=rank,
            tensor=self._plan.tensor,
            stages=1 if self._hosts_all_stages else self._plan.pipeline,
            device=self._plan.device,
            timeout_s=self._setup.step_timeout_s,
            steps_in_flight=self._plan.max_steps_in_flight,
        )

    def load(self, progress: Callable[[int, int], None]) -> tuple[WorkerReport, ...]:
        """Build the stages and read their resident units. progress(units read, units to read)."""
        if not self._alone and self._store is None:
            raise RuntimeError("connect before load")
        for rank, device in zip(self._setup.ranks, self._setup.devices, strict=True):
            timeline = None
            if self._setup.timeline:
                self._logs[rank] = PassLog(rank)
                timeline = self._logs[rank].timeline
            self._stages.append(StageRunner(self._setup, self._plan, rank, device, self._group, timeline))
        done_before, total = 0, sum(_num_resident(stage) for stage in self._stages)
        for stage in self._stages:
            before = done_before
            stage.load(lambda done, _total, before=before: progress(before + done, total))  # type: ignore[misc]
            done_before += _num_resident(stage)
        release_pool()  # where steps run on another thread
        rss = psutil.Process().memory_info().rss
        reports = [stage.worker_report(socket.gethostname(), os.getpid(), rss) for stage in self._stages]
        return tuple(replace(report, sums=self._group.sums) for report in reports)

    def step(self, plan: StepPlan) -> StepResult | None:
        """One step through the stages here. The result on tp_rank 0 of the last stage, None elsewhere.

        Raises ClusterError for a step of another gang, and with the place for whatever a stage raises.
        """
        if plan.epoch != self._setup.epoch:
            raise ClusterError(
                f"step {plan.step_id} is of gang {plan.epoch}, and the ranks {list(self._setup.ranks)} are of gang "
                f"{self._setup.epoch}: they take no part in it"
            )
        hidden: torch.Tensor | None = None
        result: StepResult | None = None
        for stage in self._stages:
            if hidden is None and not stage.model.is_first:
                if self._link is None:
                    raise RuntimeError("no link to the stage before")
                shape = (1, plan.num_tokens, stage.hidden_size)
                stage.unit = ""
                try:
                    hidden = self._link.receive(shape, stage.dtype, stage.device)
                except ClusterError as error:
                    raise ClusterError(f"{error} ({_place(stage, plan)})") from error
            output = self._run(stage, plan, None if hidden is None else hidden.to(stage.device))
            if isinstance(output, torch.Tensor):
                hidden = output
            else:
                result = output
        last = self._stages[-1]
        if not last.model.is_last:
            if self._link is None or hidden is None:
                raise RuntimeError("no link to the stage after")
            try:
                self._link.send(hidden)
            except ClusterError as error:
                raise ClusterError(f"{error} ({_place(last, plan)})") from error
            return None
        return result if last.rank_plan.tp_rank == 0 else None

    def stream_reports(self) -> tuple[StreamReport, ...]:
        return tuple(stage.stream_report() for stage in self._stages)

    def timelines(self) -> tuple[TimelineReport, ...]:
        """What the ranks here did since the last call; empty unless it is recorded."""
        return tuple(log.report() for log in self._logs.values())

    def close(self) -> None:
        """Idempotent; safe after an error."""
        for stage in self._stages:
            stage.close()
        self._stages = []
        if self._link is not None:
            self._link.close()
        self._group.close()
        self._group, self._link = collectives.NoGroup(), None
        collectives.disconnect()
        self._store = None

    def _run(self, stage: StageRunner, plan: StepPlan, hidden: torch.Tensor | None) -> torch.Tensor | StepResult:
        log = self._logs.get(stage.rank_plan.rank)
        before, start_s = None if log is None else stage.stream_report(), time.perf_counter()
        try:
            output = stage.run(plan, hidden)
        except Exception as error:
            words = str(error) if isinstance(error, ClusterError) else f"{type(error).__name__}: {error}"
            raise ClusterError(f"{words} ({_place(stage, plan)})") from error
        if log is not None and before is not None:
            log.add(plan, start_s, before, stage.stream_report())
        return output

    @property
    def _world_size(self) -> int:
        return self._plan.tensor if self._hosts_all_stages else len(self._plan.ranks)


def _place(stage: StageRunner, plan: StepPlan) -> str:
    """Where a step was when it failed, and whose it was."""
    requests = list(dict.fromkeys(chunk.request_id for batch in plan.micro_batches for chunk in batch))
    more = f" and {len(requests) - _NUM_NAMED} more" if len(requests) > _NUM_NAMED else ""
    unit = f", unit {stage.unit!r}" if stage.unit else ""
    return f"rank {stage.rank_plan.rank}{unit}, step {plan.step_id}, requests {', '.join(requests[:_NUM_NAMED])}{more}"


def _num_resident(stage: StageRunner) -> int:
    return sum(unit.tier != "nvme" or unit.kept_bytes > 0 for unit in stage.rank_plan.units)
