"""The default reader: a few threads doing direct preadv, each range cut into blocks that are read in parallel.

Direct reads keep weights out of the page cache, which a cyclic scan larger than memory would only churn.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from offload.aligned import address_of
from offload.readers.port import ReadFile, read_failed
from partition.errors import StoreError
from partition.layout import ALIGN_BLOB

BLOCK_BYTES = 4 * 2**20
NUM_THREADS = 4
MAX_TRIES = 3
CLOSE_TIMEOUT_S = 5.0


class _OpenFile:
    """A descriptor that falls back to the page cache when its file system refuses direct reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
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
        with self.lock:
            if self.direct:
                plain = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.dup2(plain, self.fd, inheritable=False)
                finally:
                    os.close(plain)
                self.direct = False


class _Range:
    """One submitted range; blocks of it are on several threads."""

    def __init__(
        self, file: ReadFile, offset: int, into: memoryview, num_blocks: int, before: Callable[[], None] | None
    ) -> None:
        self.file = file
        self.offset = offset
        self.into = into
        self.future: Future[int] = Future()
        self._before = before
        self._lock = threading.Lock()
        self._begun = False
        self._blocks_left = num_blocks
        self._error: Exception | None = None
        self._error_at = 0

    def begin(self) -> bool:
        """Called with every block, runs what must happen before the first; False when there is nothing to read."""
        with self._lock:
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


class ThreadReader:
    """See the module. `block_bytes` is a multiple of 4096; threads and descriptors live until `close`."""

    def __init__(self, num_threads: int = NUM_THREADS, block_bytes: int = BLOCK_BYTES) -> None:
        if num_threads < 1 or block_bytes < ALIGN_BLOB or block_bytes % ALIGN_BLOB:
            raise ValueError(f"{num_threads} threads with blocks of {block_bytes} bytes: a block is a multiple of 4096")
        self._block_bytes = block_bytes
        self._files: dict[Path, _OpenFile] = {}
        self._blocks: queue.SimpleQueue[tuple[_Range, _OpenFile, int, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_retries = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"reader-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def name(self) -> str:
        return "threads"

    @property
    def direct(self) -> bool:
        return all(file.direct for file in self._files.values())

    @property
    def num_retries(self) -> int:
        return self._num_retries

    def submit(
        self,
        file: ReadFile,
        offset: int,
        length: int,
        into: memoryview,
        before: Callable[[], None] | None = None,
    ) -> Future[int]:
        """See Reader.submit. Raises RuntimeError when closed and ValueError for what is not aligned (our errors)."""
        if self._closed:
            raise RuntimeError("submit on a closed reader")
        if offset % ALIGN_BLOB or length % ALIGN_BLOB or address_of(into) % ALIGN_BLOB:
            raise ValueError(
                f"direct reads need multiples of 4096: {length} bytes at {offset} into {address_of(into):#x}"
            )
        if into.nbytes < length or length < 0:
            raise ValueError(f"{length} bytes do not fit into {into.nbytes}")
        starts = range(0, max(length, 1), self._block_bytes)  # a range of no bytes has one block of none
        wanted = _Range(file, offset, into[:length], len(starts), before)
        try:
            opened = self._open(file.path)
        except OSError as error:
            wanted.future.set_exception(read_failed(file, offset, length, 0, f"cannot be opened: {error}"))
            return wanted.future
        for start in starts:
            self._blocks.put((wanted, opened, start, min(start + self._block_bytes, length)))
        return wanted.future

    def close(self) -> None:
        """See Reader.close. A thread stuck in the kernel for 5 s is left behind with the descriptors."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                block = self._blocks.get_nowait()
                if block is not None:
                    self._skip(block[0], block[2])
        for _ in self._threads:
            self._blocks.put(None)
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            for opened in self._files.values():
                os.close(opened.fd)
            self._files.clear()

    def _open(self, path: Path) -> _OpenFile:
        opened = self._files.get(path)
        if opened is None:
            opened = self._files[path] = _OpenFile(path)
        return opened

    def _skip(self, wanted: _Range, start: int) -> None:
        wanted.future.cancel()
        wanted.begin()
        wanted.block_done(start, StoreError(f"reading {wanted.file.path} was cancelled: the reader was closed"))

    def _work(self) -> None:
        while (block := self._blocks.get()) is not None:
            wanted, opened, start, end = block
            error: Exception | None = None
            try:
                if wanted.begin():
                    self._read(wanted, opened, start, end)
            except Exception as failure:
                error = failure
            wanted.block_done(start, error)
            del block, wanted, opened  # an idle thread keeps no buffer alive

    def _read(self, wanted: _Range, opened: _OpenFile, start: int, end: int) -> None:
        """Read [start, end) of the range; a short read goes on where it stopped. Raises StoreError."""
        position = reached = start
        tries = 0
        while position < end:
            reason = ""
            direct = opened.direct
            try:
                got = os.preadv(opened.fd, [wanted.into[position:end]], wanted.offset + position)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    opened.stop_direct()
                    continue
                if error.errno != errno.EIO:
                    raise read_failed(wanted.file, wanted.offset, wanted.into.nbytes, reached, str(error)) from error
                got, reason = 0, str(error)
            else:
                reason = "the file ends too early" if got == 0 else "short read"
                if got == 0:
                    tries = MAX_TRIES  # asking again will not make the file longer
            reached = max(reached, position + got)
            if not direct and got:
                os.posix_fadvise(opened.fd, wanted.offset + position, got, os.POSIX_FADV_DONTNEED)
            # a direct read can only go on at an aligned byte: the odd rest of a short read is read again
            moved = got if position + got == end or not direct else got // ALIGN_BLOB * ALIGN_BLOB
            if moved:
                position += moved
                continue
            tries += 1
            if tries >= MAX_TRIES:
                raise read_failed(wanted.file, wanted.offset, wanted.into.nbytes, reached, reason)
            with self._lock:
                self._num_retries += 1
