"""What one rank's passes took, each apart: kept while a timeline is recorded, handed out with it."""

from __future__ import annotations

import threading
import time
from collections import deque

from dist_infer.messages import PassRecord, StepPlan, StreamReport, TimelineReport
from offload.timeline import Timeline

CAPACITY = 4096


class PassLog:
    """Owns the rank's Timeline and its last passes. `add` is for the computing thread, `report` for any."""

    def __init__(self, rank: int) -> None:
        self.timeline = Timeline()
        self._rank = rank
        self._epoch_s = time.time() - time.perf_counter()
        self._passes: deque[PassRecord] = deque(maxlen=CAPACITY)
        self._lock = threading.Lock()

    def add(self, plan: StepPlan, start_s: float, before: StreamReport, after: StreamReport) -> None:
        """A pass that began at `start_s` (perf_counter) and ends now; the reports are those around it."""
        record = PassRecord(
            step_id=plan.step_id,
            num_tokens=plan.num_tokens,
            num_sampled=sum(chunk.sample for batch in plan.micro_batches for chunk in batch),
            start_s=start_s,
            end_s=time.perf_counter(),
            bytes_read=after.bytes_read - before.bytes_read,
            bytes_copied=after.bytes_copied - before.bytes_copied,
            stall_s=after.stall_s - before.stall_s,
            communication_s=after.communication_s - before.communication_s,
            compute_s=after.compute_s - before.compute_s,
        )
        with self._lock:
            self._passes.append(record)

    def report(self) -> TimelineReport:
        """What happened since the last call."""
        events, num_dropped = self.timeline.drain()
        with self._lock:
            passes = tuple(self._passes)
            self._passes.clear()
        return TimelineReport(
            rank=self._rank, epoch_s=self._epoch_s, passes=passes, events=events, num_dropped=num_dropped
        )
