"""The way from host memory to the computing device: nothing on a CPU, a copy stream and events on a GPU.

host slot h:    read ──> copied ─ read_again(h) waits ──> next read
copy stream:    wait computed(d) │ copy │ record arrived(d), left(h)
compute stream: wait arrived(d)  │ compute │ record computed(d)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from offload.slots import HostBuffer, page_buffer
from partition.layout import ALIGN_BLOB


class DeviceCopy(Protocol):
    """Buffers of both sides and the ordering between reads, copies and compute. Used by the computing thread.

    With `in_place` the host memory is computed from directly, and only `host_buffer`, `upload` and `close` are called.
    """

    @property
    def in_place(self) -> bool: ...

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        """Page-aligned host memory that reads land in and copies start from."""
        ...

    def device_buffer(self, num_bytes: int) -> torch.Tensor:
        """A uint8 tensor [num_bytes] where the computation takes place."""
        ...

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy now and wait for it: for loading."""
        ...

    def start(self, source: torch.Tensor, target: torch.Tensor, device_slot: int, host_slot: int | None) -> None:
        """Begin to fill a device slot as soon as what computes from it is over. Does not wait."""
        ...

    def before_compute(self, device_slot: int) -> None:
        """Everything computed from here on happens after the slot's copy. Does not wait."""
        ...

    def after_compute(self, device_slot: int) -> None:
        """Everything computed up to here happens before the slot's next copy. Does not wait."""
        ...

    def read_again(self, host_slot: int) -> Callable[[], None]:
        """What a reader calls, on its own thread, before it overwrites a host slot: waits for the slot's copy."""
        ...

    def close(self) -> None:
        """Wait for copies under way, so that buffers can be freed."""
        ...


class CpuCopy:
    """Host memory is where the computation takes place."""

    in_place = True

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        return page_buffer(num_bytes)

    def device_buffer(self, num_bytes: int) -> torch.Tensor:
        return page_buffer(num_bytes).tensor

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def start(self, source: torch.Tensor, target: torch.Tensor, device_slot: int, host_slot: int | None) -> None:
        target.copy_(source)

    def before_compute(self, device_slot: int) -> None:
        """Copies are over when `start` returns."""

    def after_compute(self, device_slot: int) -> None:
        """Computation is over when its call returns."""

    def read_again(self, host_slot: int) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None:
        """Nothing is under way."""


class CudaCopy:
    """Pinned host buffers, one copy stream, one event per slot and direction; no device-wide synchronisation."""

    in_place = False

    def __init__(self, device: str, num_host_slots: int, num_device_slots: int) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(device=self._device)  # type: ignore[no-untyped-call]
        self._arrived = [torch.cuda.Event() for _ in range(num_device_slots)]  # type: ignore[no-untyped-call]
        self._computed = [torch.cuda.Event() for _ in range(num_device_slots)]  # type: ignore[no-untyped-call]
        # waited for on reader threads, which must sleep there and not spin on a core
        self._left = [torch.cuda.Event(blocking=True) for _ in range(num_host_slots)]  # type: ignore[no-untyped-call]

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        if tensor.data_ptr() % ALIGN_BLOB:  # direct reads need whole pages, which the allocator does not promise
            roomy = torch.empty(num_bytes + ALIGN_BLOB, dtype=torch.uint8, pin_memory=True)
            start = -roomy.data_ptr() % ALIGN_BLOB
            tensor = roomy[start : start + num_bytes]
        return HostBuffer(tensor.numpy().data, tensor)

    def device_buffer(self, num_bytes: int) -> torch.Tensor:
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        # the memory may have had another owner whose kernels still run on the compute stream
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return buffer

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)
        torch.cuda.current_stream(self._device).synchronize()  # loading only; the source is reused at once

    def start(self, source: torch.Tensor, target: torch.Tensor, device_slot: int, host_slot: int | None) -> None:
        self._stream.wait_event(self._computed[device_slot])
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._arrived[device_slot].record(self._stream)
        if host_slot is not None:
            self._left[host_slot].record(self._stream)

    def before_compute(self, device_slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[device_slot])

    def after_compute(self, device_slot: int) -> None:
        self._computed[device_slot].record(torch.cuda.current_stream(self._device))

    def read_again(self, host_slot: int) -> Callable[[], None]:
        return self._left[host_slot].synchronize

    def close(self) -> None:
        self._stream.synchronize()


def copy_for(device: str, num_host_slots: int, num_device_slots: int) -> DeviceCopy:
    """The way to `device` ("cpu", "cuda", "cuda:1"). Raises ValueError for another kind of device."""
    kind = torch.device(device).type
    if kind == "cpu":
        return CpuCopy()
    if kind == "cuda":
        return CudaCopy(device, num_host_slots, num_device_slots)
    raise ValueError(f"weights cannot be streamed to {device!r}: cpu and cuda are supported")
