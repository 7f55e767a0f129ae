"""Checkpoint -> packed store: unit by unit, atomic, resumable, one packer at a time. Knows bytes, not models.

    for each unit without a finished blob:   source.load_unit -> write, hash, fsync, rename -> entry
    all there:                               manifest.json

Killed at any moment, the next call trusts the entries on disk, reads no finished blob again, and ends with the same
manifest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offload.aligned import aligned_memory
from offload.blob import NO_SPACE, Weights, free_bytes, layout_of, out_of_space, write_blob, write_small
from offload.digest import Digest
from offload.format import (
    MANIFEST_FILE,
    TMP_SUFFIX,
    BlobEntry,
    Manifest,
    StoreKey,
    blob_file,
    check_key,
    entry_file,
    entry_json,
    file_size,
    make_manifest,
    manifest_json,
    read_entry,
    read_manifest,
)
from offload.lock import pack_lock
from partition.errors import StoreError

VERIFY_PIECE_BYTES = 8 * 2**20


class WeightSource(Protocol):
    """Where packed tensors come from; implemented by whoever knows the model."""

    def load_unit(self, unit: str) -> Sequence[Weights]:
        """One mapping per wanted tp rank, in their order: name -> CPU tensor, converted, sharded, in its at-rest form.

        The packer lets go of the tensors before it asks for the next unit. Errors of the source pass through.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PackProgress:
    """Where packing is; blobs are counted over all wanted units and ranks, finished ones included."""

    message: str
    num_done: int
    num_total: int
    bytes_written: int


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What one call did: blobs written and found finished, bytes written, wall-clock seconds (waiting included)."""

    num_written: int
    num_reused: int
    bytes_written: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BadBlob:
    """A blob whose bytes are not the packed ones; `actual` is its digest, or in words why there is none."""

    unit: str
    tp_rank: int
    file: str
    expected: str
    actual: str


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What reading a whole store found."""

    num_checked: int
    bytes_read: int
    bad: tuple[BadBlob, ...]


def pack_store(
    directory: Path,
    key: StoreKey,
    units: Sequence[str],
    tp_ranks: Sequence[int],
    source: WeightSource,
    progress: Callable[[PackProgress], None],
    *,
    planned_bytes: Mapping[tuple[str, int], int] | None = None,
    lock_timeout_s: float = 3600.0,
) -> PackReport:
    """Bring the store in `directory` to hold every wanted (unit, rank); finished blobs are kept, others untouched.

    With `planned_bytes` (of each (unit, tp_rank)) free space is checked for everything before the first unit is
    loaded, else for each unit before it is written. A second packer of the same directory waits.
    Peak memory: the loaded unit, what the source needs to load it, and blob.PIECE_BYTES.

    Raises:
        StoreError: the disk is full or fails (what is finished stays), or the lock is not free in time.
    """
    started = time.monotonic()
    wanted = [(unit, tp_rank) for unit in units for tp_rank in tp_ranks]
    written = 0

    def report(message: str, num_done: int) -> None:
        progress(PackProgress(message=message, num_done=num_done, num_total=len(wanted), bytes_written=written))

    def advance(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes

    try:
        directory.mkdir(parents=True, exist_ok=True)
        with pack_lock(directory, lock_timeout_s, lambda message: report(message, 0)):
            for leftover in directory.glob(f"*{TMP_SUFFIX}"):
                leftover.unlink()
            missing = {blob for blob in wanted if _finished(directory, *blob, key) is None}
            num_reused = num_done = len(wanted) - len(missing)
            _forget(directory, key, missing)
            planned = planned_bytes or {}
            left = sum(planned.get(blob, 0) for blob in missing)
            _check_space(directory, left)
            for unit in units:
                ranks = [rank for rank in tp_ranks if (unit, rank) in missing]
                if not ranks:
                    continue
                report(f"packing {unit}", num_done)
                shards = list(source.load_unit(unit))
                if len(shards) != len(tp_ranks):
                    raise ValueError(f"the source gave {len(shards)} shards of {unit} for {len(tp_ranks)} ranks")
                for rank in ranks:
                    shard = shards[tp_ranks.index(rank)]
                    length = layout_of(unit, shard)[1]
                    left -= planned.get((unit, rank), 0)
                    _check_space(directory, left + length)
                    try:
                        blob = write_blob(directory, unit, rank, shard, advance)
                        write_small(directory / entry_file(unit, rank), entry_json(key, blob))
                    except OSError as error:
                        if error.errno in NO_SPACE:
                            raise out_of_space(directory, left + length, error.strerror or "no space") from error
                        raise
                    num_done += 1
                    report(f"packed {unit}", num_done)
                    del shard
                del shards  # the next unit must not meet this one in memory
            _write_manifest(directory, key)
    except OSError as error:
        raise StoreError(f"packing into {directory} failed: {error}. What is finished is kept") from error
    return PackReport(
        num_written=len(missing),
        num_reused=num_reused,
        bytes_written=written,
        seconds=time.monotonic() - started,
    )


def verify_store(directory: Path, progress: Callable[[int, int], None]) -> VerifyReport:
    """Read every blob of a store from disk and compare checksums; `progress` gets blobs done and their number.

    Raises:
        StoreError: the manifest cannot be used, or the disk fails. Wrong bytes are reported, not raised.
    """
    manifest = read_manifest(directory)
    buffer = aligned_memory(VERIFY_PIECE_BYTES)
    bad: list[BadBlob] = []
    bytes_read = 0
    for done, blob in enumerate(manifest.blobs, start=1):
        path = directory / blob.file
        size = file_size(path)
        if size == blob.length:
            actual = _digest_on_disk(path, buffer)
            bytes_read += size
        else:
            actual = "missing" if size is None else f"{size} bytes instead of {blob.length}"
        if actual != blob.digest:
            bad.append(
                BadBlob(unit=blob.unit, tp_rank=blob.tp_rank, file=blob.file, expected=blob.digest, actual=actual)
            )
        progress(done, len(manifest.blobs))
    return VerifyReport(num_checked=len(manifest.blobs), bytes_read=bytes_read, bad=tuple(bad))


def _finished(directory: Path, unit: str, tp_rank: int, key: StoreKey) -> BlobEntry | None:
    """The blob's entry when it can be trusted and its file has the right size; reads no weights."""
    try:
        path = directory / blob_file(unit, tp_rank)
        entry = read_entry(directory, unit, tp_rank, key)
    except (StoreError, ValueError):  # ValueError: a file of somebody else, named like no unit
        return None
    return entry if file_size(path) == entry.length else None


def _forget(directory: Path, key: StoreKey, missing: Iterable[tuple[str, int]]) -> None:
    """Remove what would lie about blobs that are about to be written: a manifest naming them, entries, then bytes."""
    missing = set(missing)
    manifest = _manifest_of(directory, key)
    if manifest is None or any((blob.unit, blob.tp_rank) in missing for blob in manifest.blobs):
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
    for unit, tp_rank in missing:
        (directory / entry_file(unit, tp_rank)).unlink(missing_ok=True)
        (directory / blob_file(unit, tp_rank)).unlink(missing_ok=True)


def _manifest_of(directory: Path, key: StoreKey) -> Manifest | None:
    try:
        manifest = read_manifest(directory)
        check_key(directory / MANIFEST_FILE, manifest.key, key)
    except StoreError:
        return None
    return manifest


def _write_manifest(directory: Path, key: StoreKey) -> None:
    """List every finished blob of the directory: ranks of one node may pack their own shares one after another."""
    blobs: list[BlobEntry] = []
    for path in directory.glob("*.tp*.json"):
        unit, _, rank = path.name.removesuffix(".json").rpartition(".tp")
        if rank.isdecimal() and (entry := _finished(directory, unit, int(rank), key)) is not None:
            blobs.append(entry)
    manifest = make_manifest(key, blobs)
    if _manifest_of(directory, key) == manifest:
        return
    try:
        write_small(directory / MANIFEST_FILE, manifest_json(manifest))
    except OSError as error:
        if error.errno in NO_SPACE:
            raise out_of_space(directory, len(manifest_json(manifest)), error.strerror or "no space") from error
        raise


def _check_space(directory: Path, need: int) -> None:
    if need > free_bytes(directory):
        raise out_of_space(directory, need, "the disk is too full to start")


def _digest_on_disk(path: Path, buffer: memoryview) -> str:
    """Digest of a file's bytes as the disk has them: cached pages are dropped first and afterwards."""
    digest = Digest()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            position = 0
            while got := os.preadv(fd, [buffer], position):
                digest.update(buffer[:got])
                os.posix_fadvise(fd, position, got, os.POSIX_FADV_DONTNEED)
                position += got
        finally:
            os.close(fd)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error}. Check the disk, or delete the file and pack again"
        ) from error
    return digest.hex()
