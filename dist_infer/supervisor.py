"""Keeps a run in ranks: a gang that is lost is ended whole and another one takes its place, so many times in a while.

    loss ──> Degraded ──> end the old ones ──> (nodes gone: plan anew) ──> start others ──> Ready
                 ^                                                            │ lost too
                 └────────────────────────── next attempt ────────────────────┘──> none left: Failed

The engine computes again what the old ranks knew; nobody here knows of requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from dist_infer.config import ClusterConfig
from dist_infer.engine.executor import Executor
from dist_infer.engine.recover import Recovered
from dist_infer.engine.scheduler import SchedulerConfig
from dist_infer.gang_state import Degraded, Draining, Failed, GangState, Placing, Ready, Step
from partition.errors import ClusterError, ClusterGoneError

_log = logging.getLogger(__name__)


class Replaceable(Protocol):
    """The part of a gang that is needed here; `dist_infer.gang.Gang` is one."""

    @property
    def executor(self) -> Executor: ...
    @property
    def step_timeout_s(self) -> float: ...
    @property
    def scheduler_config(self) -> SchedulerConfig: ...
    def replace(self, epoch: int) -> str: ...
    def stop(self) -> None: ...


class Supervisor:
    """Implements `dist_infer.engine.recover.Recover` for one gang, and is where its state is known.

    `note` is for the gang to say how its start goes; on_step: who wants to hear it of the first one. clock: monotonic
    seconds; wall_clock: since 1970. Any thread may ask for `state`.
    """

    def __init__(
        self,
        config: ClusterConfig,
        on_step: Callable[[Step], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._most, self._window_s = config.max_restarts, config.restart_window
        self._on_step, self._clock, self._wall_clock = on_step, clock, wall_clock
        self._gang: Replaceable | None = None
        self._attempts: deque[float] = deque()  # when, within the window
        self._epoch = 0
        self._writing = threading.Lock()  # guards the two below
        self._state: GangState = Placing()
        self._is_cancelled = False

    @property
    def state(self) -> GangState:
        return self._state

    def note(self, step: Step) -> None:
        """Of a start: of the first, or of one that mends a loss."""
        with self._writing:
            before = self._state
            if isinstance(before, Degraded):
                self._state = replace(before, step=step)
                return
            if isinstance(before, Ready | Draining | Failed):
                return  # it is being closed
            self._state = step
        self._on_step(step)

    def look_after(self, gang: Replaceable) -> None:
        """It has started, and what stands before it is there: from here on its loss is ours to mend."""
        self._gang = gang
        self._become(Ready())

    def __call__(self, error: ClusterError) -> Recovered:
        gang = self._gang
        if gang is None:
            raise RuntimeError("a loss of ranks that nobody looks after yet")
        since_s, cause, attempt, before = self._wall_clock(), str(error), 0, gang.scheduler_config
        while True:
            attempt += 1
            self._take_attempt(cause, is_new=attempt > 1)
            self._epoch += 1
            self._become(Degraded(cause=cause, since_s=since_s, attempt=attempt))
            _log.warning("ranks were lost (%s): starting gang %d in their place", cause, self._epoch)
            started_s = self._clock()
            try:
                cost = gang.replace(self._epoch)
            except ClusterGoneError as gone:  # no attempt could be better than this one
                self._become(Failed(cause=str(gone)))
                raise
            except ClusterError as again:
                self._raise_if_cancelled()
                cause = str(again)
                continue
            except Exception as refusal:  # there is no plan, or no store: another attempt would find the same
                self._become(Failed(cause=str(refusal)))
                raise
            self._become(Ready(epoch=self._epoch, note=cost))
            _log.warning(
                "gang %d is ready after %.1f s%s", self._epoch, self._clock() - started_s, f": {cost}" if cost else ""
            )
            after = gang.scheduler_config
            return Recovered(
                executor=gang.executor,
                epoch=self._epoch,
                step_timeout_s=gang.step_timeout_s,
                scheduler=None if after == before else after,
            )

    def cancel(self) -> None:
        self._become(Draining())
        with self._writing:
            self._is_cancelled = True
        if self._gang is not None:
            self._gang.stop()

    def drain(self) -> None:
        """The run is being closed."""
        self._become(Draining())

    def _take_attempt(self, cause: str, *, is_new: bool) -> None:
        """ClusterError when there have been as many as are allowed. is_new: the cause is not the engine's own words."""
        self._raise_if_cancelled()
        now_s = self._clock()
        while self._attempts and now_s - self._attempts[0] >= self._window_s:
            self._attempts.popleft()
        if len(self._attempts) >= self._most:
            self._become(Failed(cause=cause))
            raise ClusterError(_exhausted(self._most, self._window_s, cause if is_new else ""))
        self._attempts.append(now_s)

    def _raise_if_cancelled(self) -> None:
        with self._writing:
            if self._is_cancelled:
                raise ClusterError("the run is being closed")

    def _become(self, state: GangState) -> None:
        with self._writing:
            if not isinstance(self._state, Draining | Failed):
                self._state = state


def _exhausted(most: int, window_s: float, last: str) -> str:
    if most == 0:
        return "none are to be started in their place (cluster.max_restarts: 0)"
    why = f", the last because: {last}" if last else ""
    return (
        f"{most} gangs were started within {window_s:g} s and lost, as many as cluster.max_restarts and "
        f"cluster.restart_window allow{why}"
    )
