"""Ctrl-C at any moment: orderly at first, by force if that takes too long or on the second one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

import psutil

GRACE_S = 7.0
EXIT_CODE = 130
before_force: list[Callable[[], None]] = []  # called before this process is ended without its finally clauses


@contextlib.contextmanager
def end_on_interrupt() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises KeyboardInterrupt in the main thread, so that owners release what they have.

    A watchdog ends the process tree if that is not done after GRACE_S; a second signal does so at once.
    """
    timer: threading.Timer | None = None

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal timer
        if timer is not None:
            end_tree()
        timer = threading.Timer(GRACE_S, end_tree)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_tree(code: int = EXIT_CODE) -> None:
    """Kill all children and end this process, without its finally clauses."""
    for forget in before_force:
        with contextlib.suppress(Exception):
            forget()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)


class Signals:
    """A context in which SIGTERM and SIGUSR1 are something to wait for. Ctrl-C stays as it is.

    A second SIGTERM ends everything at once. In the main thread only.
    """

    def __init__(self) -> None:
        self._came: deque[int] = deque()
        self._terminated = False

    def __enter__(self) -> Signals:
        # a pipe, since a handler may run while this thread holds the lock of whatever it waits on
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def wait(self, timeout_s: float) -> int | None:
        """The first one that has come and was not waited for yet; None at the deadline."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        if not self._came and poll.poll(timeout_s * 1000):
            os.read(self._read, 4096)
        return self._came.popleft() if self._came else None

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            if self._terminated:
                end_tree()
            self._terminated = True
        self._came.append(number)
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)
