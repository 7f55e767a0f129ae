"""Linux's asynchronous reads (io_submit and its kin) through libc's `syscall`: no library, no compiler, no torch."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from dataclasses import dataclass

from partition.errors import ConfigError

_SYSCALLS = {  # io_setup, io_destroy, io_submit, io_getevents
    "x86_64": (206, 207, 209, 208),
    "aarch64": (0, 1, 2, 4),
}
_PREAD = 0  # IOCB_CMD_PREAD
_SIGNAL_EVENTFD = 1  # IOCB_FLAG_RESFD


class _Iocb(ctypes.Structure):
    """struct iocb of linux/aio_abi.h, little-endian."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("reqprio", ctypes.c_int16),
        ("fildes", ctypes.c_uint32),
        ("buf", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved2", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("resfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """struct io_event of linux/aio_abi.h."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("obj", ctypes.c_uint64),
        ("res", ctypes.c_int64),
        ("res2", ctypes.c_int64),
    )


@dataclass(frozen=True)
class AioEvent:
    """A read that is over: its ticket, and bytes read or a negative errno."""

    ticket: int
    result: int


class AioKernel:
    """One context of the kernel for at most `depth` reads. Used by one thread; `close` comes when none is in flight.

    Raises:
        ConfigError: this kernel, container or machine has no asynchronous reads left to give.
    """

    def __init__(self, depth: int, eventfd: int) -> None:
        machine = platform.machine()
        if machine not in _SYSCALLS:
            raise ConfigError(
                f"reader aio knows the processors {', '.join(_SYSCALLS)}, this is {machine}: use `reader: threads`"
            )
        self._setup, self._destroy, self._submit, self._getevents = _SYSCALLS[machine]
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._eventfd = eventfd
        self._iocbs = (_Iocb * depth)()
        self._events = (_Event * depth)()
        self._context = ctypes.c_ulong(0)
        if self._syscall(ctypes.c_long(self._setup), ctypes.c_long(depth), ctypes.byref(self._context)) < 0:
            number = ctypes.get_errno()
            cause = "fs.aio-max-nr is used up (sysctl)" if number == errno.EAGAIN else os.strerror(number)
            raise ConfigError(f"reader aio gets no asynchronous reads here: {cause}. Use `reader: threads`")

    def read(self, ticket: int, fd: int, address: int, num_bytes: int, offset: int) -> None:
        """Begin a read. The eventfd is signalled when it is over, and the event carries `ticket`.

        No two reads in flight have the same ticket modulo depth; one that never comes back tells late events apart.

        Raises OSError when the kernel does not take it: then nothing was begun.
        """
        iocb = self._iocbs[ticket % len(self._iocbs)]
        iocb.data = ticket
        iocb.opcode = _PREAD
        iocb.fildes = fd
        iocb.buf = address
        iocb.nbytes = num_bytes
        iocb.offset = offset
        iocb.flags = _SIGNAL_EVENTFD
        iocb.resfd = self._eventfd
        pointer = ctypes.pointer(iocb)
        # one at a time: of a batch the kernel would merge neighbours into requests too large for the disk's queue
        if self._syscall(ctypes.c_long(self._submit), self._context, ctypes.c_long(1), ctypes.byref(pointer)) != 1:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def events(self) -> list[AioEvent]:
        """The reads that are over by now; does not wait. Raises OSError."""
        no_time = (ctypes.c_long * 2)(0, 0)
        num_events = self._syscall(
            ctypes.c_long(self._getevents),
            self._context,
            ctypes.c_long(0),
            ctypes.c_long(len(self._events)),
            self._events,
            no_time,
        )
        if num_events < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                return []
            raise OSError(number, os.strerror(number))
        return [AioEvent(event.data, event.res) for event in self._events[:num_events]]

    def close(self) -> None:
        """Give the context back to the kernel."""
        self._syscall(ctypes.c_long(self._destroy), self._context)


def check_room(num_events: int) -> None:
    """Raises ConfigError when the kernel would not give contexts for `num_events` reads more."""
    AioKernel(num_events, eventfd=-1).close()
