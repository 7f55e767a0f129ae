"""The way from host memory to the computing device: nothing on a CPU, a copy stream and events on a GPU.

host slot h:    read ──> copied ─ read_again(h) waits ──> next read
copy stream:    wait computed(d) │ copy │ record arrived(d), left(h)
compute stream: wait arrived(d)  │ compute │ record computed(d)
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from offload.aligned import address_of
from offload.slots import HostBuffer, page_buffer
from partition.errors import BudgetError
from partition.layout import ALIGN_BLOB, round_up
from partition.sizes import format_size

_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of this process, not for one


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

    def waits(self) -> Sequence[float]:
        """Seconds that the device stood still in `before_compute`, of those calls that are known by now, in order.

        Each call is told once. Empty where compute waits on the host, which measures for itself.
        """
        ...

    def close(self) -> None:
        """Wait for copies under way, so that buffers can be freed. Idempotent."""
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

    def waits(self) -> Sequence[float]:
        return ()

    def close(self) -> None:
        """Nothing is under way."""


class PinnedPages:
    """Host buffers of our own pages, page-locked for a device, to the byte.

    torch's pinned allocator would round each buffer up to a power of two (1.7 GB to 2.1 GB) and keep what is freed; and
    memory of the driver's own is not counted by every memory cgroup. Pages of ours are.

    lock(address, num_bytes) and unlock(address): the driver's. `lock` raises RuntimeError when it cannot.
    """

    def __init__(self, lock: Callable[[int, int], None], unlock: Callable[[int], None]) -> None:
        self._lock, self._unlock = lock, unlock
        self._locked: list[tuple[int, memoryview]] = []  # holds the pages: none is unmapped while it is locked

    def buffer(self, num_bytes: int) -> HostBuffer:
        """A zeroed, page-aligned, locked buffer. Raises BudgetError when the system does not lock so much."""
        buffer = page_buffer(num_bytes)
        if num_bytes == 0:
            return buffer
        address = address_of(buffer.memory)
        try:
            self._lock(address, round_up(num_bytes, ALIGN_BLOB))
        except RuntimeError as error:
            held = sum(memory.nbytes for _, memory in self._locked)
            raise BudgetError(
                f"{format_size(num_bytes)} of host memory cannot be page-locked for the GPU beside {format_size(held)} "
                f"that is locked already ({error}): lower offload.host_memory, or raise the memory limit of the "
                "machine, its container or cgroup"
            ) from error
        self._locked.append((address, buffer.memory))
        return buffer

    def release(self) -> None:
        """Unlock all; no copy from or to it may be under way. Memory goes with the last view of it. Idempotent."""
        while self._locked:
            address, _ = self._locked.pop()
            self._unlock(address)


class CudaCopy:
    """Pinned host buffers, one copy stream, one event per slot and direction; no device-wide synchronisation."""

    in_place = False

    def __init__(self, device: str, num_host_slots: int, num_device_slots: int) -> None:
        self._device = torch.device(device)
        self._pages = PinnedPages(partial(_lock_pages, self._device), _unlock_pages)
        # for a streamer whose loading failed and that is let go without `close`; not at exit, when all goes anyway
        weakref.finalize(self, self._pages.release).atexit = False
        self._stream = torch.cuda.Stream(device=self._device)  # type: ignore[no-untyped-call]
        self._arrived = [torch.cuda.Event() for _ in range(num_device_slots)]  # type: ignore[no-untyped-call]
        self._computed = [torch.cuda.Event() for _ in range(num_device_slots)]  # type: ignore[no-untyped-call]
        # waited for on reader threads, which must sleep there and not spin on a core
        self._left = [torch.cuda.Event(blocking=True) for _ in range(num_host_slots)]  # type: ignore[no-untyped-call]
        # around each wait for a copy: as many pairs as waits are enqueued and not over, made once and used again
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        return self._pages.buffer(num_bytes)

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
        compute = torch.cuda.current_stream(self._device)
        before, after = self._spare.pop() if self._spare else (_timed_event(), _timed_event())
        before.record(compute)
        compute.wait_event(self._arrived[device_slot])
        after.record(compute)
        self._waits.append((before, after))

    def after_compute(self, device_slot: int) -> None:
        self._computed[device_slot].record(torch.cuda.current_stream(self._device))

    def read_again(self, host_slot: int) -> Callable[[], None]:
        copied = self._left[host_slot]

        def wait() -> None:
            with torch.cuda.device(self._device):  # a thread without a device would open a context on the first one
                copied.synchronize()

        return wait

    def waits(self) -> Sequence[float]:
        found = []
        while self._waits and self._waits[0][1].query():  # type: ignore[no-untyped-call]
            before, after = pair = self._waits.popleft()
            found.append(1e-3 * before.elapsed_time(after))
            self._spare.append(pair)
        return found

    def close(self) -> None:
        try:
            self._stream.synchronize()
        finally:  # after an error of the device nothing is copied any more
            self._pages.release()


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _lock_pages(device: torch.device, address: int, num_bytes: int) -> None:
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(address, num_bytes, _REGISTER_PORTABLE))


def _unlock_pages(address: int) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(runtime.cudaHostUnregister(address))


def copy_for(device: str, num_host_slots: int, num_device_slots: int) -> DeviceCopy:
    """The way to `device` ("cpu", "cuda", "cuda:1"). Raises ValueError for another kind of device."""
    kind = torch.device(device).type
    if kind == "cpu":
        return CpuCopy()
    if kind == "cuda":
        return CudaCopy(device, num_host_slots, num_device_slots)
    raise ValueError(f"weights cannot be streamed to {device!r}: cpu and cuda are supported")
