"""A memory cgroup around a command: it and all it starts get so many bytes together, page cache included.

Run: python benchmarks/memory_group.py 3GiB COMMAND [ARGUMENT ...]

Works with cgroup v1 and v2, needs the right to make groups (root, or a delegated group in --parent). Says on stderr
what was used at most; ends with the command's own exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from partition.errors import ConfigError
from partition.sizes import format_size, parse_size

MOUNTINFO = Path("/proc/self/mountinfo")
_END_TIMEOUT_S = 30.0  # from SIGKILL to gone; reads that hang in the disk hold a process up


class MemoryGroup:
    """One group, made by `with` and removed at its end together with every process that is still in it.

    limit_bytes: at most; None: measured, not limited. parent: an existing group's folder; without it, the top of the
    memory controller's tree. Raises ConfigError where no group can be made.
    """

    def __init__(self, limit_bytes: int | None, parent: Path | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 1 << 20:
            raise ConfigError(f"a memory group of {limit_bytes} bytes holds no process: give at least 1 MiB")
        self.limit_bytes = limit_bytes
        self._parent = parent or controller_root()
        self._is_v1 = not (self._parent / "cgroup.controllers").exists()
        self.folder = self._parent / f"dist-infer-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> MemoryGroup:
        try:
            if not self._is_v1 and "memory" not in (self._parent / "cgroup.subtree_control").read_text().split():
                (self._parent / "cgroup.subtree_control").write_text("+memory")
            self.folder.mkdir()
        except OSError as error:
            raise ConfigError(
                f"no memory cgroup can be made in {self._parent}: {error}. Run as root, or give a group that is "
                "delegated to you as the parent"
            ) from error
        try:
            if self.limit_bytes is not None:
                self._limit(self.limit_bytes)
        except OSError as error:
            self.folder.rmdir()
            raise ConfigError(f"{self.folder} takes no limit of {self.limit_bytes} bytes: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.folder.rmdir()

    def command(self, command: Sequence[str]) -> list[str]:
        """A command line that enters the group first and then becomes `command`: nothing of it is outside."""
        return ["sh", "-c", f'echo $$ > "{self.folder / "cgroup.procs"}" && exec "$@"', "sh", *command]

    @property
    def peak_bytes(self) -> int | None:
        """The most that was used at one time; None where the kernel does not say (v2 before Linux 5.19)."""
        file = self.folder / ("memory.max_usage_in_bytes" if self._is_v1 else "memory.peak")
        return int(file.read_text()) if file.exists() else None

    @property
    def num_kills(self) -> int:
        """Processes that the kernel ended because the group was full."""
        file = self.folder / ("memory.oom_control" if self._is_v1 else "memory.events")
        counts = dict(line.split()[:2] for line in file.read_text().splitlines())
        return int(counts.get("oom_kill", 0))

    def pids(self) -> list[int]:
        return [int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()]

    def kill(self) -> None:
        """End every process of the group and wait until all are gone. Raises TimeoutError if one stays."""
        deadline = time.monotonic() + _END_TIMEOUT_S
        while pids := self.pids():  # one that forked in between is seen the next time
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    _end(pid, deadline)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder}: {self.pids()} did not end within {_END_TIMEOUT_S:g} s of SIGKILL")

    def _limit(self, limit_bytes: int) -> None:
        # one write each: the kernel takes every write as a whole number, and an empty one as 0
        value = str(limit_bytes)
        (self.folder / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")).write_text(value)
        for name, swap in (("memory.memsw.limit_in_bytes", value), ("memory.swap.max", "0")):
            if (self.folder / name).exists():
                (self.folder / name).write_text(swap)


def controller_root(mountinfo: Path = MOUNTINFO) -> Path:
    """Where the memory controller's tree is mounted, v1 before v2 (where both are, v1 has the controller).

    Raises ConfigError where there is none.
    """
    v2: Path | None = None
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup" and "memory" in kind[2].split(","):
            return Path(fields[4])
        if kind[0] == "cgroup2" and (Path(fields[4]) / "cgroup.controllers").exists():
            v2 = v2 or Path(fields[4])
    if v2 is None or "memory" not in (v2 / "cgroup.controllers").read_text().split():
        raise ConfigError("no memory cgroup controller is mounted here: the measurement needs one")
    return v2


def _end(pid: int, deadline: float) -> None:
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        waiting = select.poll()
        waiting.register(process, select.POLLIN)
        waiting.poll(max(0.0, 1e3 * (deadline - time.monotonic())))
    finally:
        os.close(process)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("limit", help="bytes for the command and all it starts, e.g. 3GiB, or `none` to measure only")
    parser.add_argument("--parent", type=Path, help="folder of the group to make this one in")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("give a command to run")
    try:
        limit = None if arguments.limit == "none" else parse_size(arguments.limit)
        with MemoryGroup(limit, arguments.parent) as group:
            code = subprocess.run(group.command(arguments.command), check=False).returncode
            peak, kills = group.peak_bytes, group.num_kills
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    used = "unknown" if peak is None else format_size(peak)
    allowed = "" if limit is None else f" of {format_size(limit)}"
    print(f"memory group: {used}{allowed} used at most, {kills} killed by the kernel", file=sys.stderr)
    return int(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    sys.exit(main())
