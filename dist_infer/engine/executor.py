"""The port between the engine and whatever computes: a fake, this process, or actors on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dist_infer.messages import StepPlan, StepResult, StreamReport, TimelineReport, WorkerReport
from partition.errors import ClusterError

REPORT_TIMEOUT_S = 30.0  # for figures that a result rests on; who only watches waits less


class Executor(Protocol):
    """Runs steps in their order. One thread calls `submit` and `collect`; any may call the others.

    An executor is one gang of ranks: once a rank is lost it is of no more use.
    """

    def start(self) -> tuple[WorkerReport, ...]:
        """Bring all ranks up; one report for each, by rank. Raises the error tree's StoreError, ClusterError, ..."""
        ...

    def watch(self, on_loss: Callable[[ClusterError], None]) -> None:
        """Tell, once, when a rank is found dead or silent, also while no step is in flight; at once if one was before.

        After `start`. Called by a thread of the executor's own, with no lock held; not after `close`.
        """
        ...

    def submit(self, plan: StepPlan) -> None:
        """Hand a step over without waiting for it. Raises ClusterError when a rank is known to be lost."""
        ...

    def collect(self, timeout_s: float) -> StepResult:
        """Result of the oldest step in flight. Raises ClusterError on loss, on the deadline, and once closed."""
        ...

    def stream_reports(self, timeout_s: float = REPORT_TIMEOUT_S) -> tuple[StreamReport, ...]:
        """Figures of every rank's streamer so far, by rank; also while steps run.

        Of ranks that have not answered within `timeout_s` the last known ones, or none. Raises ClusterError when a rank
        is found to be lost.
        """
        ...

    def timelines(self) -> tuple[TimelineReport, ...]:
        """What every rank did since the last call, by rank; empty unless the ranks were told to record it."""
        ...

    def close(self) -> None:
        """Let go of everything; a `start` or `collect` that is under way in another thread raises. Idempotent."""
        ...
