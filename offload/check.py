"""Nothing unread or changed gets through: the length of every read, and the checksum of every blob by policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Literal

from offload.digest import Digest
from offload.format import BlobEntry
from offload.stats import StreamStats
from partition.errors import StoreError

VerifyPolicy = Literal["first", "always", "never"]


def finish_read(future: Future[int], unit: str, path: Path, length: int, timeout_s: float) -> None:
    """Wait until a read is done and has brought all of its bytes.

    Raises:
        StoreError: it failed, came up short, or was not done within `timeout_s`.
    """
    try:
        got = future.result(timeout_s)
    except FutureTimeoutError:
        raise StoreError(
            f"reading unit {unit!r} from {path} was not done after {timeout_s:g} s: the disk hangs or is far too slow. "
            "Check the disk (dmesg, iostat), or store on a local one"
        ) from None
    except CancelledError:
        raise StoreError(f"reading unit {unit!r} from {path} was cancelled: the reader was closed") from None
    if got != length:
        raise StoreError(
            f"reading unit {unit!r} from {path} brought {got} bytes instead of {length}: its content is unusable. "
            "Check the disk and the file with `dist-infer verify`"
        )


class BlobCheck:
    """Compares checksums: of each blob when this process reads it for the first time, of every read, or of none."""

    def __init__(self, policy: VerifyPolicy, directory: Path, blobs: Sequence[BlobEntry], stats: StreamStats) -> None:
        if policy not in ("first", "always", "never"):
            raise ValueError(f"verify is 'first', 'always' or 'never', not {policy!r}")
        self._policy = policy
        self._paths = [directory / blob.file for blob in blobs]
        self._blobs = blobs
        self._stats = stats
        self._verified: set[int] = set()
        self._as_opened = [_state_of(path) for path in self._paths]

    def wanted(self, index: int) -> bool:
        """Whether blob `index`, just read, has to be compared.

        Raises:
            StoreError: it has not, and its file was written to since it was opened.
        """
        if self._policy == "always" or (self._policy == "first" and index not in self._verified):
            return True
        self._refuse_changes(index)
        return False

    def verify(self, index: int, *pieces: memoryview) -> None:
        """Compare the blob's bytes, in order, if the policy wants it. Raises StoreError naming unit and file."""
        if self.wanted(index):
            digest = Digest()
            for piece in pieces:
                digest.update(piece)
            self.compare(index, digest.hex())

    def compare(self, index: int, digest: str) -> None:
        """Compare a checksum computed elsewhere. Raises StoreError naming unit and file."""
        blob = self._blobs[index]
        if digest != blob.digest:
            path = self._paths[index]
            raise StoreError(
                f"unit {blob.unit!r} in {path} is damaged: its checksum is {digest}, packed was {blob.digest}. "
                f"Run `dist-infer verify` to see what else is; delete {path} to have it packed again"
            )
        self._verified.add(index)
        self._stats.num_verified += 1

    def _refuse_changes(self, index: int) -> None:
        """A file put in its place is none of our concern: readers keep the one that they opened."""
        before, path = self._as_opened[index], self._paths[index]
        now = _state_of(path)
        if before is not None and now is not None and now != before and now[0] == before[0]:
            raise StoreError(
                f"{path} was written to while it is in use ({before[1]} bytes then, {now[1]} now): unit "
                f"{self._blobs[index].unit!r} cannot be trusted. Run `dist-infer verify`, and find out who writes there"
            )


def _state_of(path: Path) -> tuple[int, int, int] | None:
    """(inode, bytes, time of the last write), None when there is no file: reading it will tell."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
