"""Waits for a file in a directory to change, by the kernel's notices (inotify), so that nobody has to look again."""

from __future__ import annotations

import ctypes
import os
import select
from pathlib import Path
from types import TracebackType

_MODIFY, _MOVED_TO, _CREATE, _DELETE_SELF = 0x2, 0x80, 0x100, 0x400
_LONGEST_S = 1.0  # changes made through another machine's mount come without a notice
_NOTICES_BYTES = 1 << 14


class Watch:
    """Of one directory. What changes between two calls of `wait` is noticed by the second."""

    def __init__(self, directory: Path) -> None:
        """OSError when the directory is not there, or the user watches too many."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor: int = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        wanted = _MODIFY | _MOVED_TO | _CREATE | _DELETE_SELF
        if libc.inotify_add_watch(self._descriptor, os.fsencode(directory), wanted) < 0:
            os.close(self._descriptor)
            raise OSError(ctypes.get_errno(), "inotify_add_watch", str(directory))

    def wait(self, timeout_s: float) -> None:
        """Until something has changed, or it is worth a look all the same; never longer than asked."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if poll.poll(max(0.0, min(timeout_s, _LONGEST_S)) * 1000):
            os.read(self._descriptor, _NOTICES_BYTES)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
