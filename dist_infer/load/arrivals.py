"""When requests are sent: at random times whatever the server does, or as soon as another one has ended."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from partition.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Load:
    """Open loop with `rate_per_s` (Poisson), or closed loop with `concurrency`: one of the two.

    It ends after `max_requests` or when `duration_s` has passed, whichever is first; requests that were begun are
    waited for.
    """

    rate_per_s: float | None = None
    concurrency: int | None = None
    max_requests: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if (self.rate_per_s is None) == (self.concurrency is None):
            raise ConfigError("give --rate (open loop, requests a second) or --concurrency (closed loop), one of them")
        if self.max_requests is None and self.duration_s is None:
            raise ConfigError("give --max-requests or --duration, or both: the load has to end some time")
        for option, value in (
            ("--rate", self.rate_per_s),
            ("--concurrency", self.concurrency),
            ("--max-requests", self.max_requests),
            ("--duration", self.duration_s),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{option} is {value}: it must be above 0, and finite")


def poisson_times(rate_per_s: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests are due, for ever: gaps are exponential with mean 1 / rate_per_s."""
    draw = random.Random(seed)
    due_s = 0.0
    while True:
        due_s += draw.expovariate(rate_per_s)
        yield due_s
