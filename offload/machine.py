"""What this machine lets this process use: memory, cores, and how fast a file can be read. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from offload.readers.measure import ReadMeasure
from offload.readers.port import Reader
from offload.readers.threads import ThreadReader
from partition.errors import StoreError

PROC = Path("/proc")
_UNLIMITED = 2**62  # cgroup v1 writes "no limit" as a page-rounded 2**63


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """Bytes this process may still take, and which limit that is: "MemAvailable", "cgroup v1 /a/b", …"""

    bytes_available: int
    source: str


@dataclass(frozen=True, kw_only=True)
class _Group:
    """One control group this process is in, or an ancestor of it: `name` as the kernel calls it, its folder here."""

    version: int
    name: str
    folder: Path


def memory_limit(proc: Path = PROC) -> MemoryFacts:
    """The tightest of the free memory of the machine and what is left in each memory cgroup around this process.

    Page cache that the kernel would give up counts as free. `proc` is where /proc is (tests have their own).

    Raises:
        StoreError: /proc/meminfo cannot be read (not Linux).
    """
    facts = [MemoryFacts(bytes_available=_mem_available(proc), source="MemAvailable")]
    for group in _groups(proc, "memory"):
        left = _left_in(group)
        if left is not None:
            facts.append(MemoryFacts(bytes_available=left, source=f"cgroup v{group.version} {group.name}"))
    return min(facts, key=lambda fact: fact.bytes_available)


def cores(proc: Path = PROC) -> int:
    """Cores this process may compute on: its affinity, or less where a cgroup gives it less time; at least 1."""
    counts = [float(len(os.sched_getaffinity(0)))]
    for group in _groups(proc, "cpu"):
        if group.version == 1:
            quota, period = _number(group.folder / "cpu.cfs_quota_us"), _number(group.folder / "cpu.cfs_period_us")
        else:
            quota, period = _two_numbers(group.folder / "cpu.max")
        if quota is not None and period and quota > 0:
            counts.append(quota / period)
    return max(1, int(min(counts)))


def oom_kills(proc: Path = PROC) -> dict[str, int]:
    """Processes that the kernel has killed for want of memory, by whose memory it was.

    Keys: "cgroup v1 /a/b", … of each memory cgroup around this process, innermost first, then "this machine", which
    counts all of them. v1 counts what died in the very group, v2 also in the groups below it.
    """
    found = {}
    for group in _groups(proc, "memory"):
        count = _counter(group.folder / ("memory.oom_control" if group.version == 1 else "memory.events"))
        if count is not None:
            found[f"cgroup v{group.version} {group.name}"] = count
    machine = _counter(proc / "vmstat")
    return found if machine is None else {**found, "this machine": machine}


def measure_read(path: Path, seconds: float = 0.3, reader: Reader | None = None) -> float:
    """Bytes per second of reading `path` past the page cache, over and over, with the settings weights are read with.

    Takes about `seconds` and 32 MiB of memory; the file has at least 4096 bytes, better several hundred MiB.
    `reader` stays the caller's; None: one of the default kind.

    Raises:
        StoreError: the file is too short or cannot be read.
    """
    measure = ReadMeasure(path)
    if reader is not None:
        return measure.run(reader, seconds).bytes_per_s
    own = ThreadReader()
    try:
        return measure.run(own, seconds).bytes_per_s
    finally:
        own.close()


def _mem_available(proc: Path) -> int:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError) as error:
        raise StoreError(f"{proc / 'meminfo'} cannot be read: {error}. Linux is needed") from error
    raise StoreError(f"{proc / 'meminfo'} has no MemAvailable: a Linux kernel from 3.14 on is needed")


def _left_in(group: _Group) -> int | None:
    """Bytes left below the group's own limit, None where it has none."""
    if group.version == 1:
        limit, used = _number(group.folder / "memory.limit_in_bytes"), _number(group.folder / "memory.usage_in_bytes")
        prefix = "total_"  # with the groups below it, as usage_in_bytes is
    else:
        limit, used = _number(group.folder / "memory.max"), _number(group.folder / "memory.current")
        prefix = ""
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    reclaimable = 0
    for line in _text(group.folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in (f"{prefix}active_file", f"{prefix}inactive_file") and value.isdecimal():
            reclaimable += int(value)
    return max(0, limit - max(0, used - reclaimable))


def _groups(proc: Path, controller: str) -> Iterator[_Group]:
    """The groups of `controller` this process is in, innermost first, in both cgroup versions (machines mix them)."""
    mounts = _cgroup_mounts(proc)
    for line in _text(proc / "self" / "cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, name = parts
        version = 2 if controllers == "" else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        for mount_version, mounted, root, folder in mounts:
            if mount_version != version or (version == 1 and controller not in mounted):
                continue
            path = PurePosixPath(name)
            # in a container the mount shows only a part of the tree; what is above cannot be seen
            shown = path.is_relative_to(root) and ".." not in path.parts
            inside = path.relative_to(root) if shown else PurePosixPath()
            for part in (inside, *inside.parents):
                yield _Group(version=version, name=str(PurePosixPath(root) / part), folder=folder / part)
            break


def _cgroup_mounts(proc: Path) -> list[tuple[int, frozenset[str], str, Path]]:
    """(version, controllers, root of the tree that is shown, where) of each mounted cgroup file system."""
    mounts = []
    for line in _text(proc / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        mounts.append((version, frozenset(kind[2].split(",")), _unescape(fields[3]), Path(_unescape(fields[4]))))
    return mounts


def _unescape(field: str) -> str:
    """mountinfo writes blanks in paths as octal."""
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # another kernel, another set of files: a limit that cannot be read is none


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _counter(path: Path) -> int | None:
    """`oom_kill` in a file of lines "name count"."""
    for line in _text(path).splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.strip().isdecimal():
            return int(value)
    return None


def _two_numbers(path: Path) -> tuple[int | None, int | None]:
    parts = _text(path).split()
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        return None, None
    return int(parts[0]), int(parts[1])
