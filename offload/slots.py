"""The ring of reusable buffers that reads land in.

    free --begin_read--> reading --read_done--> ready --take--> in_use --give_back--> free
                            `------ read_failed ------------------------------------> free

Every step is checked: a buffer that is read into while somebody computes from it would be a silent wrong answer.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.aligned import aligned_memory

POISON_BYTE = 0xFF
"""All bits set is NaN in every float type that has one."""


class SlotState(enum.Enum):
    """Who owns a slot's bytes: nobody, the reader, nobody (complete), the streamer's caller or a copy."""

    FREE = "free"
    READING = "reading"
    READY = "ready"
    IN_USE = "in_use"


@dataclass(frozen=True)
class HostBuffer:
    """Page-aligned host memory, seen as bytes by the reader and as a uint8 tensor [num_bytes] by torch."""

    memory: memoryview
    tensor: torch.Tensor


class HostAllocator(Protocol):
    """Where host buffers come from: plain pages, or pinned ones where a GPU copies from them."""

    def host_buffer(self, num_bytes: int) -> HostBuffer: ...


def page_buffer(num_bytes: int) -> HostBuffer:
    """A buffer of plain pages, zeroed."""
    memory = aligned_memory(num_bytes)
    if num_bytes == 0:
        return HostBuffer(memory, torch.empty(0, dtype=torch.uint8))
    return HostBuffer(memory, torch.frombuffer(memory, dtype=torch.uint8))


def poison_wanted() -> bool:
    """True when DIST_INFER_POISON=1: slots are filled with NaN before each read, so that a hole shows."""
    return os.environ.get("DIST_INFER_POISON") == "1"


class SlotRing:
    """`num_slots` buffers of `slot_bytes`, allocated here and never again. Used by one thread, except `poison`."""

    def __init__(self, num_slots: int, slot_bytes: int, allocator: HostAllocator, poison: bool = False) -> None:
        self.slot_bytes = slot_bytes
        self.poisoned = poison or poison_wanted()
        self._buffers = [allocator.host_buffer(slot_bytes) for _ in range(num_slots)]
        self._states = [SlotState.FREE] * num_slots

    @property
    def num_slots(self) -> int:
        return len(self._states)

    @property
    def states(self) -> tuple[SlotState, ...]:
        return tuple(self._states)

    def buffer(self, slot: int) -> HostBuffer:
        """The slot's memory; whoever touches it must own it by its state."""
        return self._buffers[slot]

    def begin_read(self, slot: int) -> None:
        self._step(slot, SlotState.FREE, SlotState.READING)

    def read_done(self, slot: int) -> None:
        self._step(slot, SlotState.READING, SlotState.READY)

    def read_failed(self, slot: int) -> None:
        self._step(slot, SlotState.READING, SlotState.FREE)

    def take(self, slot: int) -> None:
        self._step(slot, SlotState.READY, SlotState.IN_USE)

    def give_back(self, slot: int) -> None:
        self._step(slot, SlotState.IN_USE, SlotState.FREE)

    def poison(self, slot: int) -> None:
        """Overwrite the slot with NaN; the caller (the reader, before the first byte) owns it."""
        self._buffers[slot].tensor.fill_(POISON_BYTE)

    def reset(self) -> None:
        """Forget buffers and states when no read is in flight any more; memory goes with its last view."""
        self._states = [SlotState.FREE] * len(self._states)
        self._buffers = []

    def _step(self, slot: int, before: SlotState, after: SlotState) -> None:
        if self._states[slot] is not before:
            raise RuntimeError(f"slot {slot} is {self._states[slot].value}, it should be {before.value}")
        self._states[slot] = after
