"""Disk -> host slots: the units of a fixed cyclic order, read as far ahead as there are free slots.

order of reads:   u3 u7 u9 u3 u7 u9 u3 ...      the n-th read goes into slot n % num_slots
                     └ next ┘└ reading ahead, across the end of the pass
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import torch

from offload.check import BlobCheck, finish_read
from offload.format import BlobEntry
from offload.readers.port import Reader, ReadFile
from offload.slots import SlotRing
from offload.slow_reads import ReadTime
from offload.stats import StreamStats
from offload.timeline import Timeline
from offload.views import Kept


class ReadAhead:
    """Owns the ring's states. `next` hands out slots in reading order; `again` gives one back and starts its next read.

    Used by one thread. After an error it is of no use but for `close`.
    """

    def __init__(
        self,
        *,
        directory: Path,
        blobs: Sequence[BlobEntry],
        order: Sequence[int],
        ring: SlotRing,
        reader: Reader,
        check: BlobCheck,
        stats: StreamStats,
        timeout_s: float,
        kept: Sequence[Kept],
        timeline: Timeline | None = None,
    ) -> None:
        self._blobs = blobs
        self._kept = kept
        self._lengths = [blob.length - part.streamed_from for blob, part in zip(blobs, kept, strict=True)]
        self._order = order
        self._files = [ReadFile(directory / blob.file) for blob in blobs]
        self._ring = ring
        self._reader = reader
        self._check = check
        self._stats = stats
        self._timeout_s = timeout_s
        self._timeline = timeline
        self._prefixes: Mapping[int, torch.Tensor] = {}
        self._num_submitted = 0
        self._reading: deque[tuple[int, int, Future[int]]] = deque()  # unit, slot, in order of submission
        self._times: deque[ReadTime] = deque()  # of the same reads

    def start(self, prefixes: Mapping[int, torch.Tensor]) -> None:
        """Begin to read the first units, one per slot. prefixes: of units that keep one, its bytes (uint8)."""
        self._prefixes = prefixes
        if self._order:
            for slot in range(self._ring.num_slots):
                self._submit(slot, None)

    def next_is_read(self) -> bool:
        """Whether `next` would not wait for the disk."""
        return bool(self._reading) and self._reading[0][2].done()

    def next(self, index: int) -> int:
        """The slot that holds unit `index`, complete and checked; it is the caller's until `again`.

        Raises:
            StoreError: the read failed, came up short, is damaged, or was not done in time.
            RuntimeError: it is not this unit's turn.
        """
        if not self._reading or self._reading[0][0] != index:
            raise RuntimeError(f"unit {index} is not the next one read: {[entry[:2] for entry in self._reading]}")
        _, slot, future = self._reading[0]
        length = self._lengths[index]
        finish_read(future, self._blobs[index].unit, self._files[index].path, length, self._timeout_s)
        self._reading.popleft()
        taken = self._times.popleft()
        self._stats.slow_reads.add(taken.seconds)
        self._ring.read_done(slot)
        self._stats.bytes_read += length
        self._ring.take(slot)
        memory = self._ring.buffer(slot).memory[:length]
        if self._timeline is None or not self._check.wanted(index):
            self._verify(index, memory)
        else:
            started = time.perf_counter()
            self._verify(index, memory)
            self._timeline.add("verify", self._blobs[index].unit, slot, started, self._blobs[index].length)
        return slot

    def again(self, slot: int, before: Callable[[], None] | None = None) -> None:
        """Give a slot back and read the next unit of the cycle into it, after `before` returned (on the reader)."""
        self._ring.give_back(slot)
        self._submit(slot, before)

    def close(self, timeout_s: float) -> bool:
        """Cancel what was not begun, wait for the rest; False when reads are still under way after `timeout_s`."""
        late = wait([future for *_, future in self._reading if not future.cancel()], timeout=timeout_s).not_done
        for _, slot, future in self._reading:
            if future not in late:
                self._ring.read_failed(slot)
        self._reading.clear()
        return not late

    def _verify(self, index: int, memory: memoryview) -> None:
        """The blob's checksum covers what is kept and what was read; bytes that are in both must agree."""
        prefix = self._prefixes.get(index)
        if prefix is None:
            self._check.verify(index, memory)
        elif self._check.wanted(index):
            start = self._kept[index].streamed_from
            kept = prefix.numpy().data
            self._check.verify(index, kept, memory[len(kept) - start :])
            if kept[start:] != memory[: len(kept) - start]:
                self._check.compare(index, "another in the bytes that are read twice")

    def _submit(self, slot: int, before: Callable[[], None] | None) -> None:
        index = self._order[self._num_submitted % len(self._order)]
        self._num_submitted += 1
        self._ring.begin_read(slot)
        buffer = self._ring.buffer(slot)
        if self._ring.poisoned:
            before = self._poison_after(slot, before)
        start, length = self._kept[index].streamed_from, self._lengths[index]
        taken = ReadTime(before)
        future = self._reader.submit(self._files[index], start, length, buffer.memory, taken.begin)
        future.add_done_callback(taken.end)
        if self._timeline is not None:  # also of a read that nobody comes for
            future.add_done_callback(self._noted(self._timeline, taken, index, slot))
        self._reading.append((index, slot, future))
        self._times.append(taken)

    def _noted(self, timeline: Timeline, taken: ReadTime, index: int, slot: int) -> Callable[[Future[int]], None]:
        def note(future: Future[int]) -> None:
            if taken.begun_s is not None and not future.cancelled() and future.exception() is None:
                timeline.add("read", self._blobs[index].unit, slot, taken.begun_s, self._lengths[index], taken.ended_s)

        return note

    def _poison_after(self, slot: int, before: Callable[[], None] | None) -> Callable[[], None]:
        def poison() -> None:
            if before is not None:
                before()
            self._ring.poison(slot)

        return poison
