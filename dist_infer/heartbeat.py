"""Finds ranks that are dead or silent while nobody waits for them: each is asked once a second whether it is there.

Rounds are counted, not seconds: a coordinator that was itself stopped for a minute finds its ranks' answers waiting.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from partition.errors import ClusterError

OnLoss = Callable[[ClusterError], None]
_INTERVAL_S = 1.0
_ROUNDS = 5  # at least: one answer that is late is no silence
_JOIN_S = 5.0  # a round takes one at most


class Heartbeat:
    """Owns a thread from `start` until it was stopped. What it finds is told once, by that thread, which then ends.

    ask: whether all are there, waiting so many seconds at most; returns the ranks that have not answered their oldest
    question, raises ClusterError when one is gone. lost: makes silent ranks' silence an end, and an error of it.
    """

    def __init__(
        self,
        ask: Callable[[float], Sequence[int]],
        lost: Callable[[Sequence[int]], ClusterError],
        *,
        timeout_s: float,
    ) -> None:
        self._ask, self._lost = ask, lost
        self._interval_s = min(_INTERVAL_S, timeout_s / _ROUNDS)
        self._most_missed = math.ceil(timeout_s / self._interval_s)
        self._on_loss: OnLoss | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dist-infer-heartbeat", daemon=True)
        self.error: ClusterError | None = None

    def start(self, on_loss: OnLoss) -> None:
        self._on_loss = on_loss
        self._thread.start()

    def stop(self) -> None:
        """Nothing is told from here on. Waits for nothing; idempotent."""
        self._stopped.set()

    def join(self) -> None:
        """After `stop`: wait for the round that is under way. It ends at once where those it asks are gone."""
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        missed: dict[int, int] = {}
        while not self._stopped.is_set():
            started = time.monotonic()
            try:
                missed = {rank: missed.get(rank, 0) + 1 for rank in self._ask(self._interval_s)}
            except ClusterError as error:
                self._tell(error)
                return
            if silent := [rank for rank, count in missed.items() if count >= self._most_missed]:
                self._tell(self._lost(silent))
                return
            self._stopped.wait(max(0.0, started + self._interval_s - time.monotonic()))

    def _tell(self, error: ClusterError) -> None:
        if not self._stopped.is_set():
            self.error = error
            if self._on_loss is not None:
                self._on_loss(error)
