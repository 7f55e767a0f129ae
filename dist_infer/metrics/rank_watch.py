"""The ranks' cumulative figures, read at most twice a second, and what they did in the last ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dist_infer.messages import StreamReport, WorkerReport
from dist_infer.metrics.window import WorkWindow
from dist_infer.summary import bound_by, difference, nothing
from partition.plan import Plan

LEAST_S = 0.5  # between two readings


@runtime_checkable
class Ranks(Protocol):
    """What has ranks; `dist_infer.LLM` is one."""

    @property
    def plan(self) -> Plan: ...
    @property
    def worker_reports(self) -> tuple[WorkerReport, ...]: ...
    def stream_reports(self) -> tuple[StreamReport, ...]: ...


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """By rank, as of one reading. reports: since the ranks began; spent: in the window, nothing when idle."""

    plan: Plan
    workers: tuple[WorkerReport, ...]
    reports: tuple[StreamReport, ...]
    spent: tuple[StreamReport, ...]

    def spent_by_stage(self) -> dict[int, list[StreamReport]]:
        found: dict[int, list[StreamReport]] = {}
        for report in self.spent:
            found.setdefault(self.plan.ranks[report.rank].stage, []).append(report)
        return found


class RankWatch:
    """`read` may wait for the ranks and is called in one thread at a time; the rest is for any thread."""

    def __init__(self, ranks: Ranks, clock: Callable[[], float] = time.monotonic) -> None:
        self._ranks, self._clock = ranks, clock
        self._window: WorkWindow[tuple[StreamReport, ...]] = WorkWindow()
        self._read_s: float | None = None
        self._workers: tuple[WorkerReport, ...] = ()
        self.last: RankFigures | None = None

    @property
    def is_due(self) -> bool:
        return self._read_s is None or self._clock() - self._read_s >= LEAST_S

    def read(self) -> None:
        """Ask the ranks; `last` is the answer. Raises what they raise, then `last` stays."""
        self._read_s = self._clock()
        reports = tuple(sorted(self._ranks.stream_reports(), key=lambda report: report.rank))
        plan, workers = self._ranks.plan, self._ranks.worker_reports
        if len(reports) != len(plan.ranks):
            return  # they are being replaced
        idle = tuple(nothing(report.rank) for report in reports)
        if workers != self._workers:
            self._workers = workers
            self._window.clear()
            self._window.add(self._read_s, 0.0, idle)  # all began with nothing
        self._window.add(self._read_s, sum(report.busy_s for report in reports), reports)
        span = self._window.span(self._read_s)
        spent = idle if span is None else tuple(map(difference, *span))
        self.last = RankFigures(plan=plan, workers=workers, reports=reports, spent=spent)


def overlap(ranks: Sequence[StreamReport]) -> float | None:
    """Of a stage's ranks: the share of their working time in which they did not wait for weights; None when idle."""
    busy_s = sum(report.busy_s for report in ranks)
    return min(1.0, max(0.0, 1.0 - sum(report.stall_s for report in ranks) / busy_s)) if busy_s > 0 else None


def limited_by(plan: Plan, ranks: Sequence[StreamReport]) -> str | None:
    """What a stage's time went to: disk, network, compute, or link on a GPU that reads no disk; None when idle."""
    return bound_by(plan, ranks) if any(report.busy_s > 0 for report in ranks) else None
