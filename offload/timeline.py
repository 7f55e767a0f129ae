"""When each unit was read, waited for, checked, copied and computed: what a picture of a pass is drawn from.

Recorded only where somebody asked for it; a streamer without a Timeline spends one `is None` check per unit on it.
All times are of `time.perf_counter`, which the processes of one machine share. On a GPU, copy and compute are
enqueued by the host: their events say when it did that, not when the device was busy.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

Kind = Literal["read", "wait", "compute", "copy", "verify"]
CAPACITY = 1 << 15
"""Events kept: about eighty passes over a hundred units, some megabytes."""


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """One unit's time from `start_s` to `end_s`. slot: of the host ring, or the device's for copies; -1: resident."""

    kind: Kind
    unit: str
    slot: int
    start_s: float
    end_s: float
    num_bytes: int = 0


class Timeline:
    """The last `capacity` events of one rank; older ones make room. `add` and `drain` may be called by any thread.

    `waited`, `begin_compute` and `end_compute` belong to the thread that computes.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._events: deque[TimelineEvent] = deque(maxlen=capacity)
        self._num_dropped = 0
        self._lock = threading.Lock()
        self._compute_start_s = 0.0

    def add(
        self, kind: Kind, unit: str, slot: int, start_s: float, num_bytes: int = 0, end_s: float | None = None
    ) -> float:
        """Note an event; returns the time of its end, which is now unless it is given."""
        end_s = time.perf_counter() if end_s is None else end_s
        event = TimelineEvent(kind, unit, slot, start_s, end_s, num_bytes)
        with self._lock:
            self._num_dropped += len(self._events) == self._events.maxlen
            self._events.append(event)
        return end_s

    def waited(self, unit: str, slot: int, start_s: float) -> None:
        """The computing thread waited for a streamed unit since `start_s` and computes it from now on."""
        self._compute_start_s = self.add("wait", unit, slot, start_s)

    def begin_compute(self) -> None:
        """A resident unit is computed from now on."""
        self._compute_start_s = time.perf_counter()

    def end_compute(self, unit: str, slot: int, num_bytes: int) -> None:
        """The unit of `num_bytes` that was last waited for is let go."""
        self.add("compute", unit, slot, self._compute_start_s, num_bytes)

    def drain(self) -> tuple[tuple[TimelineEvent, ...], int]:
        """(events since the last call in the order they were noted, how many were lost because there were too many)."""
        with self._lock:
            events, num_dropped = tuple(self._events), self._num_dropped
            self._events.clear()
            self._num_dropped = 0
        return events, num_dropped
