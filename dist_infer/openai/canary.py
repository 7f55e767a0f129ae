"""Whether an idle engine's ranks still answer: one token, asked for by readiness probes when nothing has run lately.

A rank that was lost while nobody asked for anything would otherwise be found by the first user. The engine's own
deadline of a step decides when silence is a failure; here nothing waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from dist_infer.engine.stats import EngineStats
from dist_infer.outputs import Event
from dist_infer.sampling_params import SamplingParams
from partition.errors import DistInferError

RECENT_S = 30.0


class Askable(Protocol):
    """The part of an engine that is needed here."""

    def submit(
        self, text: str | None, ids: list[int], params: SamplingParams, on_event: Callable[[Event], None]
    ) -> str: ...
    @property
    def stats(self) -> EngineStats: ...


class Canary:
    """Called by readiness probes, from one thread. recent_s: an engine that made a step since then needs no asking."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, recent_s: float = RECENT_S) -> None:
        self._clock, self._recent_s = clock, recent_s
        self._num_steps = -1
        self._last_step_s = clock()

    def look(self, engine: Askable) -> None:
        """Ask an engine that is idle for one token. What comes of it shows in the engine's `failure`."""
        stats, now_s = engine.stats, self._clock()
        if stats.num_steps != self._num_steps:
            self._num_steps, self._last_step_s = stats.num_steps, now_s
        if now_s - self._last_step_s < self._recent_s or stats.num_running or stats.num_waiting:
            return
        self._last_step_s = now_s  # not again before this one has had its time
        try:
            engine.submit(None, [0], SamplingParams(max_tokens=1, temperature=0), _ignore)
        except DistInferError:
            return  # it has failed or is closed, and says so itself


def _ignore(event: Event) -> None:
    """Nobody reads the token."""
