"""Host -> device slots, for devices that do not compute from host memory: copies in order of use, ahead of compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from offload.device_copy import DeviceCopy
from offload.format import BlobEntry
from offload.read_ahead import ReadAhead
from offload.slots import SlotRing
from offload.stats import StreamStats


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
    ) -> None:
        self._blobs = blobs
        self._order = order
        self._host = host
        self._ring = ring
        self._read_ahead = read_ahead
        self._copy = copy
        self._stats = stats
        slot_bytes = max((blobs[index].length for index in order), default=0)
        self._slots = [copy.device_buffer(slot_bytes) for _ in range(num_slots)] if order else []
        self._num_copied = 0
        self._num_used = 0

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
        self._copy.before_compute(slot)
        self.copy_ahead()
        return slot

    def done(self, slot: int) -> None:
        """What was enqueued up to here was the last use of the slot; further copies are started."""
        self._copy.after_compute(slot)
        self._num_used += 1
        self.copy_ahead()

    def close(self) -> None:
        """Wait for copies under way and let the device slots go."""
        self._copy.close()
        self._slots = []

    def _copy_next(self) -> None:
        index = self._order[self._num_copied % len(self._order)]
        length = self._blobs[index].length
        slot = self._num_copied % len(self._slots)
        target = self._slots[slot][:length]
        if index in self._host:
            self._copy.start(self._host[index][:length], target, slot, None)
        else:
            host_slot = self._read_ahead.next(index)
            self._copy.start(self._ring.buffer(host_slot).tensor[:length], target, slot, host_slot)
            self._read_ahead.again(host_slot, self._copy.read_again(host_slot))
        self._num_copied += 1
        self._stats.bytes_copied += length
