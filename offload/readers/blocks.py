"""Reading one block completely: what is asked for again, how often, and when it is an error. Blocking `preadv`."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from offload.readers.open_files import OpenFile
from offload.readers.port import read_failed
from offload.readers.ranges import RangeRead
from partition.layout import ALIGN_BLOB

MAX_TRIES = 3


class BlockProgress:
    """How far [start, end) of a range is; told what each read brought, it says whether to go on or raises."""

    def __init__(self, wanted: RangeRead, start: int, end: int, count_retry: Callable[[], None]) -> None:
        self.wanted = wanted
        self.start = start
        self.end = end
        self.position = start
        self._reached = start
        self._tries = 0
        self.count_retry = count_retry

    @property
    def done(self) -> bool:
        return self.position >= self.end

    def got(self, num_bytes: int, *, direct: bool) -> None:
        """A read at `position` brought `num_bytes`. Raises StoreError when it brings nothing more."""
        self._reached = max(self._reached, self.position + num_bytes)
        if num_bytes == 0:
            raise self._failed("the file ends too early")  # asking again will not make the file longer
        # a direct read can only go on at an aligned byte: the odd rest of a short read is read again
        whole = self.position + num_bytes == self.end or not direct
        moved = num_bytes if whole else num_bytes // ALIGN_BLOB * ALIGN_BLOB
        self.position += moved
        if moved == 0:
            self._again("short read")

    def failed(self, error: OSError) -> None:
        """A read at `position` ended in `error`: EIO is tried again a few times. Raises StoreError for all else."""
        if error.errno != errno.EIO:
            raise self._failed(str(error)) from error
        self._again(str(error))

    def _again(self, reason: str) -> None:
        self._tries += 1
        if self._tries >= MAX_TRIES:
            raise self._failed(reason)
        self.count_retry()

    def _failed(self, reason: str) -> Exception:
        return read_failed(self.wanted.file, self.wanted.offset, self.wanted.into.nbytes, self._reached, reason)


def read_block(progress: BlockProgress, opened: OpenFile) -> None:
    """Read the rest of the block with blocking reads, past the page cache where that works. Raises StoreError."""
    wanted = progress.wanted
    while not progress.done:
        direct = opened.direct
        at = wanted.offset + progress.position
        try:
            got = os.preadv(opened.fd, [wanted.into[progress.position : progress.end]], at)
        except OSError as error:
            if error.errno == errno.EINVAL and direct:
                opened.stop_direct()
                continue
            progress.failed(error)
            continue
        if not direct and got:
            os.posix_fadvise(opened.fd, at, got, os.POSIX_FADV_DONTNEED)
        progress.got(got, direct=direct)
