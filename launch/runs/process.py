"""A process that is told from every other one: its pid, when it started, and the boot in which that was."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STATE, _START_TICKS = 0, 19  # fields of /proc/PID/stat, counted behind the name, which may hold anything


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """start_ticks: since the machine's boot, as the kernel counts, so that no clock that is set changes it."""

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def here(cls) -> ProcessId:
        """This process."""
        found = _fields(os.getpid())
        if found is None:
            raise RuntimeError("/proc does not know this process")
        return cls(pid=os.getpid(), start_ticks=int(found[_START_TICKS]), boot_id=_boot_id())

    @property
    def is_alive(self) -> bool:
        """False also for a zombie, and where the pid is another process's by now."""
        found = _fields(self.pid)
        if found is None or found[_STATE] in ("Z", "X") or self.boot_id != _boot_id():
            return False
        return int(found[_START_TICKS]) == self.start_ticks

    def send(self, number: signal.Signals) -> bool:
        """Signal it and nobody else. False when it has ended; PermissionError when it is another user's."""
        descriptor = self._open()
        if descriptor is None:
            return False
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    def wait(self, timeout_s: float) -> bool:
        """Until it has ended. False at the deadline."""
        descriptor = self._open()
        if descriptor is None:
            return True
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            return bool(poll.poll(max(0.0, timeout_s) * 1000)) or not self.is_alive
        finally:
            os.close(descriptor)

    def _open(self) -> int | None:
        """A handle on it. What is opened first and compared then cannot become another process's in between."""
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            if self.is_alive:
                return descriptor
            os.close(descriptor)
        return None


def _fields(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()
