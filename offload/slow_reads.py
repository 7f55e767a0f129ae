"""Reads that took far longer than the others: the first sign of a disk that is about to fail, or is shared."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from statistics import median

NUM_COMPARED = 64
TIMES_MEDIAN = 10.0
LEAST_S = 0.1


class ReadTime:
    """How long one read took, without its time in the queue. The reader's threads call `begin` and `end`."""

    def __init__(self, before: Callable[[], None] | None) -> None:
        self._before = before
        self.begun_s: float | None = None  # time.perf_counter
        self._ended_s: float | None = None

    def begin(self) -> None:
        """For Reader.submit's `before`: does what had to be done before, and takes the time."""
        if self._before is not None:
            self._before()
        self.begun_s = time.perf_counter()

    def end(self, _: Future[int]) -> None:
        """For the future: the read is done."""
        self._ended_s = time.perf_counter()

    @property
    def ended_s(self) -> float:
        """Of a read whose future is done; callbacks may come a moment after those who wait for it."""
        return time.perf_counter() if self._ended_s is None else self._ended_s

    @property
    def seconds(self) -> float:
        """How long it took; 0 for a read that was never begun."""
        return 0.0 if self.begun_s is None else self.ended_s - self.begun_s


class SlowReads:
    """Counts reads slower than 10 medians of the last 64 and than 100 ms. `count` is read by any thread."""

    def __init__(self) -> None:
        self.count = 0
        self._last: deque[float] = deque(maxlen=NUM_COMPARED)

    def add(self, seconds: float) -> None:
        """One more read, in the order of the cycle."""
        if seconds > LEAST_S and self._last and seconds > TIMES_MEDIAN * median(self._last):
            self.count += 1
        self._last.append(seconds)
