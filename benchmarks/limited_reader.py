"""A disk of a given speed for each process, whatever the machine has: for measuring pipelines on one machine.

`install`, called in every process of a run before it loads a model, puts the limit around every reader that is made.
The bytes are really read; they only count as read when that disk would have delivered them.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from offload.readers import choose
from offload.readers.port import Reader, ReadFile

RATE = "DIST_INFER_BENCH_DISK"  # bytes per second, in the environment


class LimitedReader:
    """One request after the other, each as long as its bytes take at `bytes_per_s`. Implements the port of readers."""

    def __init__(self, inner: Reader, bytes_per_s: float) -> None:
        self._inner, self._bytes_per_s = inner, bytes_per_s
        self._waiting: queue.SimpleQueue[tuple[Future[int], Future[int], int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._deliver, name="limited-reader", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return f"{self._inner.name} at {self._bytes_per_s / 1e6:.0f} MB/s"

    @property
    def direct(self) -> bool:
        return self._inner.direct

    @property
    def num_retries(self) -> int:
        return self._inner.num_retries

    def submit(
        self, file: ReadFile, offset: int, length: int, into: memoryview, before: Callable[[], None] | None = None
    ) -> Future[int]:
        done: Future[int] = Future()
        done.set_running_or_notify_cancel()
        self._waiting.put((self._inner.submit(file, offset, length, into, before), done, length))
        return done

    def close(self) -> None:
        self._waiting.put(None)
        self._inner.close()
        self._thread.join(5)

    def _deliver(self) -> None:
        free_at = 0.0
        while (item := self._waiting.get()) is not None:
            inner, done, length = item
            free_at = max(free_at, time.monotonic()) + length / self._bytes_per_s
            try:
                got = inner.result()
            except Exception as error:
                done.set_exception(error)
                continue
            time.sleep(max(0.0, free_at - time.monotonic()))
            done.set_result(got)


def install() -> None:
    """Limit every reader that this process makes, if the environment says so."""
    rate = os.environ.get(RATE)
    if rate is None:
        return
    make = choose.make_reader
    choose.make_reader = lambda name: LimitedReader(make(name), float(rate))
