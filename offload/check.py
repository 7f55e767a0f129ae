"""Nothing unread or changed gets through: the length of every read, and the checksum of every blob by policy."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Literal

from offload.digest import digest_of
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
        self._directory = directory
        self._blobs = blobs
        self._stats = stats
        self._verified: set[int] = set()

    def wanted(self, index: int) -> bool:
        """Whether blob `index`, just read, has to be compared."""
        return self._policy == "always" or (self._policy == "first" and index not in self._verified)

    def verify(self, index: int, memory: memoryview) -> None:
        """Compare the blob's bytes if the policy wants it. Raises StoreError naming unit and file."""
        if self.wanted(index):
            self.compare(index, digest_of(memory))

    def compare(self, index: int, digest: str) -> None:
        """Compare a checksum computed elsewhere. Raises StoreError naming unit and file."""
        blob = self._blobs[index]
        if digest != blob.digest:
            path = self._directory / blob.file
            raise StoreError(
                f"unit {blob.unit!r} in {path} is damaged: its checksum is {digest}, packed was {blob.digest}. "
                f"Run `dist-infer verify` to see what else is; delete {path} to have it packed again"
            )
        self._verified.add(index)
        self._stats.num_verified += 1
