"""Disk -> host slots: the units of a fixed cyclic order, read as far ahead as there are free slots.

order of reads:   u3 u7 u9 u3 u7 u9 u3 ...      the n-th read goes into slot n % num_slots
                     └ next ┘└ reading ahead, across the end of the pass
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

from offload.check import BlobCheck, finish_read
from offload.format import BlobEntry
from offload.readers.port import Reader, ReadFile
from offload.slots import SlotRing
from offload.stats import StreamStats


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
    ) -> None:
        self._blobs = blobs
        self._order = order
        self._files = [ReadFile(directory / blob.file) for blob in blobs]
        self._ring = ring
        self._reader = reader
        self._check = check
        self._stats = stats
        self._timeout_s = timeout_s
        self._num_submitted = 0
        self._reading: deque[tuple[int, int, Future[int]]] = deque()  # unit, slot, in order of submission

    def start(self) -> None:
        """Begin to read the first units, one per slot."""
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
        blob = self._blobs[index]
        finish_read(future, blob.unit, self._files[index].path, blob.length, self._timeout_s)
        self._reading.popleft()
        self._ring.read_done(slot)
        self._stats.bytes_read += blob.length
        self._ring.take(slot)
        self._check.verify(index, self._ring.buffer(slot).memory[: blob.length])
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

    def _submit(self, slot: int, before: Callable[[], None] | None) -> None:
        index = self._order[self._num_submitted % len(self._order)]
        self._num_submitted += 1
        self._ring.begin_read(slot)
        buffer = self._ring.buffer(slot)
        if self._ring.poisoned:
            before = self._poison_after(slot, before)
        future = self._reader.submit(self._files[index], 0, self._blobs[index].length, buffer.memory, before)
        self._reading.append((index, slot, future))

    def _poison_after(self, slot: int, before: Callable[[], None] | None) -> Callable[[], None]:
        def poison() -> None:
            if before is not None:
                before()
            self._ring.poison(slot)

        return poison
