"""The disk that the packed store is on: its kind, its room, how fast it reads past the page cache."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.doctor.finding import Finding, error, ok, warning
from offload.machine import measure_read
from partition.errors import StoreError
from partition.sizes import format_size

_CHECK = "disk"
_NETWORK_KINDS = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "ceph", "gpfs", "beegfs", "virtiofs", "afs")
_MEMORY_KINDS = ("tmpfs", "ramfs")
_SAMPLE_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_SPARE_BYTES = 1 << 30  # a sample is only written where so much is free
_SECONDS = 0.4
_SLOW_SHARE = 0.5
PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    """`path`: the store's directory, or what exists of the way to it. `device`, `kind`, `mount`: of its file system.

    `refusal`: why nothing can be written there; else empty. `blobs`: finished ones of the store, and their bytes.
    """

    path: str
    mount: str
    device: str
    kind: str
    free_bytes: int
    refusal: str
    blobs: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class DiskRate:
    """Bytes per second of O_DIRECT reads of `sample`; None: not measured, and `sample` says why not."""

    bytes_per_s: float | None
    sample: str


def read_disk(store: Path, proc: Path = PROC) -> DiskFacts:
    """Makes and changes nothing. Raises OSError."""
    path = next(each for each in (store, *store.parents) if each.exists())
    room = os.statvfs(path)
    refusal = ""
    if not path.is_dir():
        refusal = "it is no directory"
    elif room.f_flag & os.ST_RDONLY:
        refusal = "it is mounted read-only"
    elif not os.access(path, os.W_OK | os.X_OK):
        refusal = f"user {os.geteuid()} may not write there"
    mount, kind, device = _mount_of(path.resolve(), proc)
    return DiskFacts(
        path=str(path),
        mount=mount,
        device=device,
        kind=kind,
        free_bytes=room.f_bavail * room.f_frsize,
        refusal=refusal,
        blobs=_finished(store),
    )


def measure_disk(store: Path, facts: DiskFacts) -> DiskRate:
    """Reads the largest blob for a moment or, where there is none, a file without a name that is gone with this call.

    Takes `_SECONDS` and the time to write 64 MiB. Raises StoreError or OSError when the disk does.
    """
    if facts.blobs:
        largest = max(facts.blobs, key=lambda name: facts.blobs[name])
        return DiskRate(bytes_per_s=measure_read(store / largest, _SECONDS), sample=f"of {largest}")
    if facts.refusal or facts.free_bytes < _SPARE_BYTES:
        return DiskRate(bytes_per_s=None, sample="there is no blob to read, and no room to write a sample")
    with tempfile.TemporaryFile(dir=facts.path, buffering=0) as file:
        piece = os.urandom(_PIECE_BYTES)
        for _ in range(_SAMPLE_BYTES // _PIECE_BYTES):
            if file.write(piece) != _PIECE_BYTES:
                raise StoreError(f"{facts.path} took less than it was given")
        os.fsync(file.fileno())
        rate = measure_read(Path(f"/proc/self/fd/{file.fileno()}"), _SECONDS)
    return DiskRate(bytes_per_s=rate, sample=f"of {format_size(_SAMPLE_BYTES)} written for it")


def is_shared(facts: DiskFacts) -> bool:
    """Whether other nodes may see, and write, the same store."""
    return any(kind in (facts.kind, facts.kind.partition(".")[0].rstrip("0123456789")) for kind in _NETWORK_KINDS)


def judge_disk(node: str, facts: DiskFacts, needed: Mapping[str, int] | None) -> list[Finding]:
    """needed: blobs that the store must hold there, and their bytes; None: not known."""
    findings = []
    place = f"{facts.path} ({facts.kind} on {facts.mount})"
    if is_shared(facts):
        findings.append(
            warning(
                _CHECK,
                node,
                f"offload.store is on a network file system: {place}",
                why="every pass reads what is streamed through the network, together with all other nodes, and "
                "O_DIRECT and locks are not what they are on a disk",
                do="set offload.store to a directory on a local NVMe",
            )
        )
    if facts.kind in _MEMORY_KINDS:
        findings.append(
            warning(
                _CHECK,
                node,
                f"offload.store is in memory: {place}",
                why="what is kept on disk to spare memory takes it all the same, and is gone after a restart",
                do="set offload.store to a directory on a local NVMe",
            )
        )
    missing = {name: size for name, size in (needed or {}).items() if name not in facts.blobs}
    left = sum(missing.values())
    if facts.refusal and (missing or needed is None):
        findings.append(
            error(
                _CHECK,
                node,
                f"offload.store cannot be written at {place}: {facts.refusal}",
                why="the weights have to be packed there before a rank can read them",
                do="change its owner or mode, or choose another offload.store",
                kind="store",
            )
        )
    elif left > facts.free_bytes:
        findings.append(
            error(
                _CHECK,
                node,
                f"packing into {place} needs {format_size(left)} ({left} bytes) more, free are "
                f"{format_size(facts.free_bytes)} ({facts.free_bytes} bytes)",
                why="packing would end where the disk is full",
                do="free some space or choose another offload.store",
                kind="store",
            )
        )
    if not any(finding.severity == "error" for finding in findings):
        todo = "" if needed is None else f"; {_packed(len(needed) - len(missing), len(needed), left)}"
        findings.append(ok(_CHECK, node, f"{place}: {format_size(facts.free_bytes)} free{todo}"))
    return findings


def judge_rate(node: str, rate: DiskRate, *, assumed: float, effect: str) -> Finding:
    """assumed: bytes per second that a plan takes before it has measured.

    effect: in words, what the plan predicts with the rates that were measured; empty where it makes no difference.
    """
    if rate.bytes_per_s is None:
        return ok(_CHECK, node, f"reading was not measured: {rate.sample}")
    what = f"{rate.bytes_per_s / 1e9:.2f} GB/s by O_DIRECT reads {rate.sample} (a plan assumes {assumed / 1e9:.2f})"
    if not effect or rate.bytes_per_s >= _SLOW_SHARE * assumed:
        return ok(_CHECK, node, what)
    return warning(
        _CHECK,
        node,
        what,
        why=f"weights that do not fit in memory are read once a pass{effect}",
        do="look whether something else uses this disk, move offload.store to a faster one, give more "
        "offload.host_memory, or store fewer bytes (offload.encoding)",
    )


def _packed(num_there: int, num_needed: int, left: int) -> str:
    if left:
        return f"{num_there} of {num_needed} blobs are there, {format_size(left)} are still to be written"
    return f"all {num_needed} blobs are there"


def _finished(store: Path) -> dict[str, int]:
    """A blob is finished once its entry is there, too."""
    if not store.is_dir():
        return {}
    return {path.name: path.stat().st_size for path in store.glob("*.bin") if path.with_suffix(".json").exists()}


def _mount_of(path: Path, proc: Path) -> tuple[str, str, str]:
    """(where it is mounted, kind, device) of the file system of `path`; the last mount on a place hides the others."""
    best = ("/", "unknown", "unknown")
    for line in (proc / "self" / "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 2:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])  # blanks are octal
        if path.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind[0], kind[1])
    return best
