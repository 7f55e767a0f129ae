"""One check on a thread of its own, so that one that hangs (a dead network disk) costs no more than its deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Generic, TypeVar

T = TypeVar("T")


class Running(Generic[T]):
    """`work` begins at once. Its thread is a daemon: the end of the process does not wait for it."""

    def __init__(self, work: Callable[[], T], *, limit_s: float, name: str) -> None:
        self._work, self._name = work, name
        self._limit_s, self._deadline_s = limit_s, time.monotonic() + limit_s
        self._future: Future[T] = Future()
        threading.Thread(target=self._run, name=f"dist-infer-doctor-{name}", daemon=True).start()

    def result(self) -> T:
        """Waits until its deadline. Raises what the work raised, and TimeoutError when it has not ended."""
        try:
            return self._future.result(max(0.0, self._deadline_s - time.monotonic()))
        except FutureTimeoutError:
            if self._future.done():  # the work's own
                raise
            raise TimeoutError(f"it had not ended after {self._limit_s:g} s") from None

    def _run(self) -> None:
        try:
            self._future.set_result(self._work())
        except BaseException as error:  # it is the caller's to see
            self._future.set_exception(error)
