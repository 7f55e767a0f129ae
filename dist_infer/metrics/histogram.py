"""A histogram that costs one bisection a value; it becomes Prometheus' cumulative buckets when it is read."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""From a small model in memory to a large one that is read from disk in every pass."""

TOKENS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0)


class Histogram:
    """One thread adds, any may read: a reader sees whole counts, its sum at most some values older or newer."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)  # upper and inclusive, ascending
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """`count` observations of the same value."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def sum(self) -> float:
        return self._sum

    def buckets(self) -> list[tuple[float, int]]:
        """(upper bound, values up to it); the last bound is infinity and has the count of all."""
        total, found = 0, []
        for bound, count in zip((*self._bounds, math.inf), tuple(self._counts), strict=True):
            total += count
            found.append((bound, total))
        return found


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """The value below which `share` of the values are, evenly spread within a bucket; None without any value.

    Beyond the last finite bound it is that bound: more is not known.
    """
    if not buckets or buckets[-1][1] <= 0:
        return None
    wanted, low, below = share * buckets[-1][1], 0.0, 0.0
    for bound, total in buckets:
        if total >= wanted and total > below:
            return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / (total - below)
        low, below = bound, total
    return low
