"""The last ten seconds of work, between readings at which some had been done.

A pass over a large model may take a minute, and what ranks were busy with is counted when it ends: between two readings
nothing, then all at once. So a reading without new work is no end of a window, and a window may be longer than asked.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")
WINDOW_S = 10.0


class WorkWindow(Generic[T]):
    """Readings by one clock, ascending; `busy_s` is cumulative."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, float, T]] = deque()

    def add(self, at_s: float, busy_s: float, reading: T) -> None:
        """A count that went back was begun anew, and so is the window."""
        if self._readings and busy_s < self._readings[-1][1]:
            self._readings.clear()
        if not self._readings or busy_s > self._readings[-1][1]:
            self._readings.append((at_s, busy_s, reading))
        while len(self._readings) > 2 and self._readings[1][0] <= at_s - WINDOW_S:
            self._readings.popleft()

    def span(self, now_s: float) -> tuple[T, T] | None:
        """Its first reading and its last; None while idle: nothing for longer than a window and the last work took."""
        if len(self._readings) < 2:
            return None
        newest_s = self._readings[-1][0]
        if now_s - newest_s > WINDOW_S + (newest_s - self._readings[-2][0]):
            return None
        return self._readings[0][2], self._readings[-1][2]

    def clear(self) -> None:
        self._readings.clear()
