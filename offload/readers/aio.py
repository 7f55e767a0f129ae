"""Linux's asynchronous reads: one thread keeps up to `depth` blocks in flight, without a thread for each.

    submit() ──> arrived ─┐
    close()  ─────────────┤ eventfd ──> the thread: takes events, continues or ends blocks, begins new ones
    the kernel, each end ─┘

On an idle machine as fast as the threads for half of their processor time, on a busy one up to a tenth slower
(benchmarks/readers.py); `reader: auto` measures which it is. What the kernel does not read
asynchronously (a file that refuses O_DIRECT) is read with blocking reads on the same thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from offload.aligned import address_of
from offload.readers.aio_kernel import AioEvent, AioKernel
from offload.readers.blocks import BlockProgress, read_block
from offload.readers.open_files import OpenFile, OpenFiles
from offload.readers.pool import CLOSE_TIMEOUT_S
from offload.readers.port import ReadFile
from offload.readers.ranges import RangeRead, check_block_bytes

BLOCK_BYTES = 2**20
DEPTH = 32


@dataclass(frozen=True)
class _Block:
    """A block that waits or is in flight. While it is in flight it keeps the memory that the kernel writes to."""

    progress: BlockProgress
    opened: OpenFile


class AioReader:
    """See the module. `block_bytes` is a multiple of 4096; the thread and the descriptors live until `close`.

    Raises ConfigError where the kernel has no asynchronous reads to give. `kernel` is for tests: what stands between
    this reader and the system, made for a depth and an eventfd.
    """

    def __init__(
        self,
        depth: int = DEPTH,
        block_bytes: int = BLOCK_BYTES,
        kernel: Callable[[int, int], AioKernel] = AioKernel,
    ) -> None:
        check_block_bytes(block_bytes)
        if depth < 1:
            raise ValueError(f"a depth of {depth} reads nothing")
        self._block_bytes = block_bytes
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._kernel = kernel(depth, self._wake)
        except BaseException:
            os.close(self._wake)
            raise
        self._files = OpenFiles()
        self._arrived: queue.SimpleQueue[tuple[RangeRead, OpenFile]] = queue.SimpleQueue()
        self._closed = False
        self._num_retries = 0
        self._waiting: deque[_Block] = deque()
        # the thread's own
        self._depth = depth
        self._free = list(range(depth))  # tickets; each comes back as another one
        self._flying: dict[int, _Block] = {}
        self._thread = threading.Thread(target=self._work, name="reader-aio", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return "aio"

    @property
    def direct(self) -> bool:
        return self._files.direct

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
        wanted, opened = self._files.begin(file, offset, length, into, self._block_bytes, before)
        if opened is None:
            return wanted.future
        self._arrived.put((wanted, opened))
        os.eventfd_write(self._wake, 1)
        return wanted.future

    def close(self) -> None:
        """See Reader.close. Reads that the disk holds for 5 s are left behind, with their memory and descriptors."""
        if self._closed:
            return
        self._closed = True
        # not left to the thread, which may be waiting for somebody's `before`
        with contextlib.suppress(queue.Empty):
            while True:
                wanted, _ = self._arrived.get_nowait()
                for start, _end in wanted.blocks():
                    wanted.block_dropped(start)
        with contextlib.suppress(IndexError):
            while True:
                progress = self._waiting.popleft().progress
                progress.wanted.block_dropped(progress.start)
        os.eventfd_write(self._wake, 1)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._kernel.close()
            self._files.close()
            os.close(self._wake)

    def _work(self) -> None:
        while not (self._closed and not self._flying and not self._waiting and self._arrived.empty()):
            os.eventfd_read(self._wake)
            for event in self._kernel.events():
                self._land(event)
            with contextlib.suppress(queue.Empty):
                while True:
                    self._take(*self._arrived.get_nowait())
            self._begin_waiting()

    def _take(self, wanted: RangeRead, opened: OpenFile) -> None:
        """Cut a range that was submitted into blocks."""
        for start, end in wanted.blocks():
            self._waiting.append(_Block(BlockProgress(wanted, start, end, self._count_retry), opened))

    def _begin_waiting(self) -> None:
        """Begin as many blocks as may be in flight; once the reader is closed, drop those not begun."""
        while self._free or self._closed:
            try:
                block = self._waiting.popleft()
            except IndexError:
                return
            wanted, start = block.progress.wanted, block.progress.start
            if self._closed:
                wanted.block_dropped(start)
            elif not wanted.begin():
                wanted.block_done(start, None)
            elif not self._fly(block):
                return

    def _fly(self, block: _Block) -> bool:
        """Begin or continue a block; False when the kernel takes no more before some read is over."""
        progress = block.progress
        if progress.done:
            progress.wanted.block_done(progress.start, None)
            return True
        if not block.opened.direct:
            self._read_blocking(block)
            return True
        ticket = self._free.pop()
        address = address_of(progress.wanted.into) + progress.position
        num_bytes = progress.end - progress.position
        self._flying[ticket] = block
        try:
            self._kernel.read(ticket, block.opened.fd, address, num_bytes, progress.wanted.offset + progress.position)
        except OSError as error:
            del self._flying[ticket]
            self._free.append(ticket)
            if error.errno == errno.EAGAIN and self._flying:
                self._waiting.appendleft(block)
                return False
            self._read_blocking(block)
        return True

    def _land(self, event: AioEvent) -> None:
        """A read is over: end its block, or read on what is missing. An end that nobody waits for changes nothing."""
        block = self._flying.pop(event.ticket, None)
        if block is None:
            return
        self._free.append(event.ticket + self._depth)  # an event that comes twice must not end the next read
        progress = block.progress
        try:
            if event.result == -errno.EINVAL:
                self._read_blocking(block)  # which knows how to do without O_DIRECT
                return
            if event.result < 0:
                progress.failed(OSError(-event.result, os.strerror(-event.result)))
            else:
                progress.got(event.result, direct=True)
        except Exception as error:
            progress.wanted.block_done(progress.start, error)
        else:
            self._fly(block)

    def _read_blocking(self, block: _Block) -> None:
        """The way of the other readers, for files that the kernel does not read asynchronously."""
        error: Exception | None = None
        try:
            read_block(block.progress, block.opened)
        except Exception as failure:
            error = failure
        block.progress.wanted.block_done(block.progress.start, error)

    def _count_retry(self) -> None:
        self._num_retries += 1
