"""Ends what a run left: every process that carries its mark, their shared memory, its Ray's directory.

Run as a script it is the guardian: it waits for the end of one process, however that comes, and clears up behind it:

    python -I -S reap.py PID START_TICKS MARK=RUN_ID HOME

It needs the standard library alone, so that it costs a few MB; that is why it reads /proc itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

_SHARED = "/dev/shm/"
REAP_S = 10.0  # the kernel ends what it is told to end in milliseconds; more means a process stuck in a device


def reap(mark: str, home: str | None, timeout_s: float = REAP_S) -> list[int]:
    """Kill what carries `mark` (VARIABLE=VALUE, as in an environment), this process excepted; remove `home`.

    Returns the pids of those that are still there at the deadline. Looks again until nobody is left, because what is
    killed may have been about to start another.
    """
    deadline = time.monotonic() + timeout_s
    shared: set[str] = set()
    left = marked(mark)
    while left:
        for pid in left:
            shared |= _shared_memory(pid)
        _kill(left, mark, deadline)
        left = marked(mark)
        if time.monotonic() > deadline:
            break
    for path in shared - _mapped():  # CUDA's are every process's
        with contextlib.suppress(OSError):
            os.unlink(path)
    if home is not None:
        shutil.rmtree(home, ignore_errors=True)
    return left


def marked(mark: str) -> list[int]:
    """The pids of this user's processes that carry it, this one excepted."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and _carries(pid, mark)]


def _carries(pid: int, mark: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()  # empty for a zombie, closed to other users
    except OSError:
        return False
    return mark.encode() in environment.split(b"\0")


def _kill(pids: list[int], mark: str, deadline: float) -> None:
    """All at once, then wait for each. A handle is opened first: behind it a pid cannot become another process's."""
    handles = []
    for pid in pids:
        with contextlib.suppress(OSError):
            handles.append(os.pidfd_open(pid))
            if _carries(pid, mark):
                signal.pidfd_send_signal(handles[-1], signal.SIGKILL)
    for handle in handles:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        os.close(handle)


def _shared_memory(pid: int) -> set[str]:
    """Files of shared memory that it has mapped and that still have a name."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    paths = {line[line.index(_SHARED) :] for line in lines if _SHARED in line}
    return {path for path in paths if not path.endswith(" (deleted)")}


def _mapped() -> set[str]:
    """By any process that this user may ask; what another user's alone has mapped is not this user's to remove."""
    return set().union(*(_shared_memory(int(name)) for name in os.listdir("/proc") if name.isdigit()))


def _wait_for_end(pid: int, start_ticks: str) -> None:
    """Returns when that process has ended, at once if it is not there any more."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(pid)
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        if fields[19] == start_ticks:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll()


def _guard() -> None:
    pid, start_ticks, mark, home = sys.argv[1:]
    if os.fork():  # nobody's child: not ended with the run's children, and nobody has to wait for it
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    _wait_for_end(int(pid), start_ticks)
    reap(mark, home)


if __name__ == "__main__":
    _guard()
