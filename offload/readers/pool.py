"""Threads that read the blocks of ranges in the order of submission: what blocking readers have in common."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from offload.readers.blocks import BlockProgress
from offload.readers.open_files import OpenFile, OpenFiles
from offload.readers.port import ReadFile
from offload.readers.ranges import RangeRead, check_block_bytes

CLOSE_TIMEOUT_S = 5.0


class BlockRead(Protocol):
    """Reads one block on the calling thread; one thread calls it. Raises StoreError."""

    def __call__(self, progress: BlockProgress, opened: OpenFile) -> None: ...


class BlockPool:
    """A Reader with one thread for each of `reads`. Threads and descriptors live until `close`."""

    def __init__(self, name: str, block_bytes: int, reads: Sequence[BlockRead]) -> None:
        check_block_bytes(block_bytes)
        if not reads:
            raise ValueError("a reader without threads reads nothing")
        self._name = name
        self._block_bytes = block_bytes
        self._files = OpenFiles()
        self._blocks: queue.SimpleQueue[tuple[RangeRead, OpenFile, int, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_retries = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(read,), name=f"reader-{index}", daemon=True)
            for index, read in enumerate(reads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def name(self) -> str:
        return self._name

    @property
    def direct(self) -> bool:
        return self._files.direct

    @property
    def num_retries(self) -> int:
        return self._num_retries

    @property
    def is_working(self) -> bool:
        """True as long as a thread lives: after `close` only where the kernel holds one."""
        return any(thread.is_alive() for thread in self._threads)

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
        for start, end in wanted.blocks():
            self._blocks.put((wanted, opened, start, end))
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
                    block[0].block_dropped(block[2])
        for _ in self._threads:
            self._blocks.put(None)
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not self.is_working:
            self._files.close()

    def _work(self, read: BlockRead) -> None:
        while (block := self._blocks.get()) is not None:
            wanted, opened, start, end = block
            error: Exception | None = None
            try:
                if wanted.begin():
                    read(BlockProgress(wanted, start, end, self._count_retry), opened)
            except Exception as failure:
                error = failure
            wanted.block_done(start, error)
            del block, wanted, opened, error  # an idle thread keeps no buffer alive

    def _count_retry(self) -> None:
        with self._lock:
            self._num_retries += 1
