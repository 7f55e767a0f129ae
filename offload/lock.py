"""The lock of one store directory: one packer at a time, released by the kernel when its owner dies."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from pathlib import Path

from offload.format import LOCK_FILE
from partition.errors import StoreError


@contextmanager
def pack_lock(directory: Path, timeout_s: float, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the exclusive lock of `directory`; `waiting` gets one message when somebody else has it.

    Raises:
        StoreError: it was not free within `timeout_s` seconds.
    """
    path = directory / LOCK_FILE
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting(f"waiting for another process that is packing {directory}")
        fd = _wait(path, fd, timeout_s)
    except BaseException:
        os.close(fd)
        raise
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone would leave it held by a child that inherited the descriptor
        os.close(fd)


def _wait(path: Path, fd: int, timeout_s: float) -> int:
    """Wait in the kernel, in a thread of its own because flock knows no deadline; the thread owns `fd` until then."""
    locked: Future[int] = Future()

    def take() -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            os.close(fd)
            if locked.set_running_or_notify_cancel():
                locked.set_exception(error)
            return
        if locked.set_running_or_notify_cancel():
            locked.set_result(fd)
        else:
            os.close(fd)  # nobody waits any more

    threading.Thread(target=take, name="pack-lock", daemon=True).start()
    try:
        return locked.result(timeout_s)
    except FutureTimeoutError:
        if locked.cancel():
            raise StoreError(
                f"another process has been packing {path.parent} for more than {timeout_s:.0f} s: "
                f"see who holds {path} (`fuser {path}`), or pack into another directory"
            ) from None
        return locked.result(timeout_s)
    except BaseException:
        if not locked.cancel():
            os.close(locked.result(timeout_s))
        raise
