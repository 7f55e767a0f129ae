"""A gate between the ranks of one machine: nobody passes before all have come, and nobody waits without end.

Each rank counts its own arrivals in a word of memory that all of them see. Who comes last wakes the others; who waits
long sleeps in the kernel (a futex), sees when a peer's process ends, and gives up at the deadline.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import time

from partition.errors import ClusterError

_LINE_WORDS = 16  # a rank's words have a cache line of their own: its arrivals, its pid
_LINE_BYTES = 4 * _LINE_WORDS
_PID = 1
_SPIN_S = 100e-6  # peers are mostly closer than what a sleep costs
_LOOK_S = 0.2  # how soon the end of a peer is seen
_WRAP = 2**32
_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_EVERYBODY = 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_wait_call = ctypes.CDLL(None).syscall  # lets other threads run
_wake_call = ctypes.PyDLL(None).syscall  # does not, for so short a call
_wait_call.restype = _wake_call.restype = ctypes.c_long


def is_available() -> bool:
    """Whether this machine's kernel has what is needed."""
    return _FUTEX_CALL is not None


def memory_bytes(size: int) -> int:
    """What `size` ranks need."""
    return size * _LINE_BYTES


class Arrivals:
    """One rank's side of the gate. Not thread-safe. Owns handles of its peers' processes from `watch_peers` on.

    memory: the same `memory_bytes(size)` zero bytes for all ranks, mapped; borrowed until `close`.
    """

    def __init__(self, memory: mmap.mmap, rank: int, size: int, timeout_s: float) -> None:
        self._rank, self._others, self._timeout_s = rank, [other for other in range(size) if other != rank], timeout_s
        self._words = memoryview(memory).cast("I")
        self._first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(self._first)
        self._addresses = [ctypes.c_void_p(address + other * _LINE_BYTES) for other in range(size)]
        self._number = ctypes.c_long(_FUTEX_CALL or 0)
        self._operation, self._everybody = ctypes.c_int(_FUTEX_WAKE), ctypes.c_int(_EVERYBODY)
        self._handles: dict[int, int] = {}  # of the peers' processes, by rank
        self._poll = select.poll()
        self._words[rank * _LINE_WORDS + _PID] = os.getpid()

    def watch_peers(self) -> None:
        """After all ranks have made theirs. Raises OSError where their processes are not visible from here."""
        for other in self._others:
            handle = os.pidfd_open(self._words[other * _LINE_WORDS + _PID])
            self._handles[other] = handle
            self._poll.register(handle, select.POLLIN)

    def meet(self) -> None:
        """Returns when all ranks have called this as often. ClusterError by name of whoever is dead or late."""
        words, own = self._words, self._rank * _LINE_WORDS
        before = words[own]
        words[own] = (before + 1) % _WRAP
        _wake_call(self._number, self._addresses[self._rank], self._operation, self._everybody, None, None, 0)
        # A peer is one arrival behind us, as far as we are, or one ahead: it cannot go on without us.
        for other in self._others:
            if words[other * _LINE_WORDS] == before:
                self._wait(other, before)

    def close(self) -> None:
        """Idempotent. The memory can be unmapped after this."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}
        self._words.release()
        del self._first

    def _wait(self, other: int, before: int) -> None:
        words, index = self._words, other * _LINE_WORDS
        started = time.monotonic()
        spins_end, deadline = started + _SPIN_S, started + self._timeout_s
        while words[index] == before:
            now = time.monotonic()
            if now < spins_end:
                continue
            if gone := {handle for handle, _ in self._poll.poll(0)}:
                names = ", ".join(str(rank) for rank, handle in self._handles.items() if handle in gone)
                raise ClusterError(f"the process of tensor rank {names} has ended")
            if now >= deadline:
                raise ClusterError(
                    f"tensor rank {other} has not come to a sum within {self._timeout_s:g} s (engine.step_timeout)"
                )
            wait = _Timespec(0, int(min(_LOOK_S, deadline - now) * 1e9))
            still, address = ctypes.c_uint32(before), self._addresses[other]
            _wait_call(self._number, address, ctypes.c_int(_FUTEX_WAIT), still, ctypes.byref(wait), None, 0)
