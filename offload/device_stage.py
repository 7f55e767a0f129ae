"""Host -> device slots, for devices that do not compute from host memory: copies in order of use, ahead of compute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from offload.device_copy import DeviceCopy
from offload.format import BlobEntry
from offload.read_ahead import ReadAhead
from offload.slots import SlotRing
from offload.stats import StreamStats
from offload.timeline import Timeline


class DeviceStage:
    """The n-th streamed unit goes into device slot n % num_slots. Used by the computing thread alone.

    `order` holds the streamed units of a pass; those in `host` come from resident host buffers, the others from disk.
    """

    def __init__(
        self,
        *,
        blobs: Sequence[BlobEntry],
        order: Sequence[int],
        host: Mapping[int, torch.Tensor],
        ring: SlotRing,
        read_ahead: ReadAhead,
        copy: DeviceCopy,
        num_slots: int,
        stats: StreamStats,
        timeline: Timeline | None = None,
    ) -> None:
        self._blobs = blobs
        self._order = order
        self._host = host
        self._ring = ring
        self._read_ahead = read_ahead
        self._copy = copy
        self._stats = stats
        self._timeline = timeline
        slot_bytes = max((blobs[index].length for index in order), default=0)
        self._slots = [copy.device_buffer(slot_bytes) for _ in range(num_slots)] if order else []
        self._num_copied = 0
        self._num_used = 0
        self._waiting: deque[str] = deque()  # units whose wait on the device is not known yet, in order

    def buffer(self, slot: int) -> torch.Tensor:
        """The whole device slot, uint8."""
        return self._slots[slot]

    def copy_ahead(self) -> None:
        """Start every copy that has a free device slot and its bytes in host memory; waits for nothing."""
        while self._order and self._num_copied - self._num_used < len(self._slots):
            index = self._order[self._num_copied % len(self._order)]
            if index not in self._host and not self._read_ahead.next_is_read():
                return
            self._copy_next()

    def next(self, index: int) -> int:
        """The device slot of unit `index`; compute enqueued from here on sees its bytes. Waits for the disk if need be.

        Raises:
            StoreError: see ReadAhead.next.
            RuntimeError: it is not this unit's turn.
        """
        if self._order[self._num_used % len(self._order)] != index:
            raise RuntimeError(f"unit {index} is not the next one streamed")
        if self._num_copied == self._num_used:
            self._copy_next()
        slot = self._num_used % len(self._slots)
        self._waiting.append(self._blobs[index].unit)
        self._copy.before_compute(slot)
        self.settle()
        self.copy_ahead()
        return slot

    def done(self, slot: int) -> None:
        """What was enqueued up to here was the last use of the slot; further copies are started."""
        self._copy.after_compute(slot)
        self._num_used += 1
        self.copy_ahead()

    def settle(self) -> None:
        """Count what the device waited for copies, as far as it is over. Waits for nothing.

        The host only enqueues: without this a pass that the link bounds would look like one that computes.
        """
        for seconds in self._copy.waits():
            self._stats.add_stall(self._waiting.popleft(), seconds)

    def close(self) -> None:
        """Wait for copies under way and let the device slots go."""
        self._copy.close()
        self._slots = []

    def _copy_next(self) -> None:
        index = self._order[self._num_copied % len(self._order)]
        length = self._blobs[index].length
        slot = self._num_copied % len(self._slots)
        target = self._slots[slot][:length]
        host_slot = None if index in self._host else self._read_ahead.next(index)
        source = self._host[index] if host_slot is None else self._ring.buffer(host_slot).tensor
        started = time.perf_counter()
        self._copy.start(source[:length], target, slot, host_slot)
        if self._timeline is not None:
            self._timeline.add("copy", self._blobs[index].unit, slot, started, length)
        if host_slot is not None:
            self._read_ahead.again(host_slot, self._copy.read_again(host_slot))
        self._num_copied += 1
        self._stats.bytes_copied += length
