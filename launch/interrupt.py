"""Ctrl-C at any moment: orderly at first, by force if that takes too long or on the second one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import psutil

GRACE_S = 7.0
EXIT_CODE = 130


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
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)
