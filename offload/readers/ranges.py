"""One submitted range while blocks of it are read, and the rules every range has to keep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from offload.aligned import address_of
from offload.readers.port import ReadFile
from partition.errors import StoreError
from partition.layout import ALIGN_BLOB


def check_range(offset: int, length: int, into: memoryview) -> None:
    """Raises ValueError for what is not aligned or does not fit: bugs of ours, not of people."""
    if offset % ALIGN_BLOB or length % ALIGN_BLOB or address_of(into) % ALIGN_BLOB:
        raise ValueError(f"direct reads need multiples of 4096: {length} bytes at {offset} into {address_of(into):#x}")
    if into.nbytes < length or length < 0:
        raise ValueError(f"{length} bytes do not fit into {into.nbytes}")


def check_block_bytes(block_bytes: int) -> None:
    """Raises ValueError: a block is a positive multiple of 4096."""
    if block_bytes < ALIGN_BLOB or block_bytes % ALIGN_BLOB:
        raise ValueError(f"blocks of {block_bytes} bytes: a block is a multiple of 4096")


class RangeRead:
    """Blocks of it may be on several threads. Its future is done with its last block, so nobody writes after that."""

    def __init__(
        self,
        *,
        file: ReadFile,
        offset: int,
        into: memoryview,
        block_bytes: int,
        before: Callable[[], None] | None,
    ) -> None:
        self.file = file
        self.offset = offset
        self.into = into
        self.future: Future[int] = Future()
        self._before = before
        self._block_bytes = block_bytes
        self._begin_lock = threading.Lock()  # held while `before` runs, which may take its time
        self._lock = threading.Lock()
        self._begun = False
        self._blocks_left = max(1, -(-into.nbytes // block_bytes))  # a range of no bytes has one block of none
        self._error: Exception | None = None
        self._error_at = 0

    def blocks(self) -> Iterator[tuple[int, int]]:
        """[start, end) of each block within the range, in order."""
        for start in range(0, max(self.into.nbytes, 1), self._block_bytes):
            yield start, min(start + self._block_bytes, self.into.nbytes)

    def begin(self) -> bool:
        """Called with every block, runs what must happen before the first; False when there is nothing to read."""
        with self._begin_lock:
            if not self._begun:
                self._begun = True
                if not self.future.set_running_or_notify_cancel():
                    self._error = StoreError(f"reading {self.file.path} was cancelled")
                elif self._before is not None:
                    try:
                        self._before()
                    except Exception as error:
                        self._error = error
            return self._error is None

    def block_done(self, start: int, error: Exception | None) -> None:
        """Count a block; the last one completes the future, so nothing writes to `into` after that.

        Of several errors the one of the first block counts: a file cut off fails there, and in all blocks behind.
        """
        with self._lock:
            if error is not None and (self._error is None or start < self._error_at):
                self._error, self._error_at = error, start
            self._blocks_left -= 1
            if self._blocks_left or self.future.cancelled():
                return
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self.into.nbytes)

    def block_dropped(self, start: int) -> None:
        """Count a block that will not be read, because the reader is closed. Waits for nobody."""
        if self.future.cancel():
            self.begin()  # tells those who wait
        self.block_done(start, StoreError(f"reading {self.file.path} was cancelled: the reader was closed"))
