"""The descriptors of a reader: opened once, direct where the file system can, given back at the end."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from offload.readers.port import ReadFile, read_failed
from offload.readers.ranges import RangeRead, check_range


class OpenFile:
    """A descriptor that falls back to the page cache when its file system refuses direct reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            self.direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.direct = False

    def stop_direct(self) -> None:
        """Some file systems accept O_DIRECT and refuse the read. Other threads may be reading: the number stays."""
        with self._lock:
            if self.direct:
                plain = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.dup2(plain, self.fd, inheritable=False)
                finally:
                    os.close(plain)
                self.direct = False


class OpenFiles:
    """Every file a reader was asked for, by path. `open` is called from one thread."""

    def __init__(self) -> None:
        self._files: dict[Path, OpenFile] = {}

    @property
    def direct(self) -> bool:
        """True as long as no file had to be read through the page cache."""
        return all(file.direct for file in list(self._files.values()))

    def open(self, path: Path) -> OpenFile:
        """The file at `path` as it was at the first call. Raises OSError."""
        opened = self._files.get(path)
        if opened is None:
            opened = self._files[path] = OpenFile(path)
        return opened

    def begin(
        self,
        file: ReadFile,
        offset: int,
        length: int,
        into: memoryview,
        block_bytes: int,
        before: Callable[[], None] | None,
    ) -> tuple[RangeRead, OpenFile | None]:
        """What a reader's `submit` begins with: a checked range, and its file; None where the range has failed already.

        Raises ValueError for what is not aligned or does not fit (our errors).
        """
        check_range(offset, length, into)
        wanted = RangeRead(file=file, offset=offset, into=into[:length], block_bytes=block_bytes, before=before)
        try:
            return wanted, self.open(file.path)
        except OSError as error:
            wanted.future.set_exception(read_failed(file, offset, length, 0, f"cannot be opened: {error}"))
            return wanted, None

    def close(self) -> None:
        """Give the descriptors back; nobody may be reading."""
        for opened in self._files.values():
            os.close(opened.fd)
        self._files.clear()
