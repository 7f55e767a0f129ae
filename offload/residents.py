"""Loading the units that stay: read once, checked, into a buffer of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import torch

from offload.check import BlobCheck, finish_read
from offload.device_copy import DeviceCopy
from offload.digest import Digest
from offload.format import BlobEntry
from offload.readers.port import Reader, ReadFile
from offload.slots import HostBuffer, page_buffer
from offload.stats import StreamStats

IN_FLIGHT = 4
"""Ranges read at the same time, so that the disk has work while a checksum is computed."""

STAGING_BYTES = 32 * 2**20
"""Bytes per range on the way to a device: loading needs IN_FLIGHT of them in host memory, and no more."""


class ResidentLoader:
    """Reads whole blobs into host or device buffers. After an error, `close` waits for what is still in flight."""

    def __init__(
        self,
        *,
        directory: Path,
        blobs: Sequence[BlobEntry],
        reader: Reader,
        check: BlobCheck,
        copy: DeviceCopy,
        stats: StreamStats,
        timeout_s: float,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self._directory = directory
        self._blobs = blobs
        self._reader = reader
        self._check = check
        self._copy = copy
        self._stats = stats
        self._timeout_s = timeout_s
        self._staging_bytes = staging_bytes
        self._reading: deque[tuple[int, HostBuffer, int, Future[int]]] = deque()  # unit, buffer, length

    def to_host(self, lengths: Mapping[int, int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (unit, the first `lengths[unit]` of its bytes in a page-aligned host buffer) as they are complete.

        Whole units are checked; of others, the rest is needed for that. Raises StoreError.
        """
        for index, length in lengths.items():
            if len(self._reading) == IN_FLIGHT:
                yield self._host_done()
            self._submit(index, 0, length, self._copy.host_buffer(length))
        while self._reading:
            yield self._host_done()

    def to_device(self, indices: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (unit, its bytes in a device buffer) as they are complete and checked. Raises StoreError."""
        free = self._staging(indices)
        for index in indices:
            target = self._copy.device_buffer(self._blobs[index].length)
            for done, piece in self._pieces(index, free):
                self._copy.upload(piece, target[done : done + len(piece)])
                self._stats.bytes_copied += len(piece)
            yield index, target

    def checked(self, indices: Sequence[int]) -> Iterator[int]:
        """Yield units that stay on disk, read once for their checksum where the policy wants it. Raises StoreError."""
        free = self._staging(indices)
        for index in indices:
            if self._check.wanted(index):
                for _ in self._pieces(index, free):
                    pass
            yield index

    def close(self, timeout_s: float) -> bool:
        """Cancel, and wait for reads under way; False when some are still not done."""
        late = wait([future for *_, future in self._reading if not future.cancel()], timeout=timeout_s).not_done
        self._reading.clear()
        return not late

    def _staging(self, indices: Sequence[int]) -> list[HostBuffer]:
        longest = max((self._blobs[index].length for index in indices), default=0)
        return [page_buffer(min(self._staging_bytes, longest)) for _ in range(IN_FLIGHT)] if indices else []

    def _pieces(self, index: int, free: list[HostBuffer]) -> Iterator[tuple[int, torch.Tensor]]:
        """(position, bytes) of a blob's pieces in order, each valid until the next; the whole is checked at the end."""
        blob = self._blobs[index]
        digest = Digest() if self._check.wanted(index) else None
        done = submitted = 0
        while done < blob.length:
            while free and submitted < blob.length:
                length = min(self._staging_bytes, blob.length - submitted)
                self._submit(index, submitted, length, free.pop())
                submitted += length
            _, buffer, length = self._finish()
            if digest is not None:
                digest.update(buffer.memory[:length])
            yield done, buffer.tensor[:length]
            done += length
            free.append(buffer)
        if digest is not None:
            self._check.compare(index, digest.hex())

    def _submit(self, index: int, offset: int, length: int, buffer: HostBuffer) -> None:
        file = ReadFile(self._directory / self._blobs[index].file)
        future = self._reader.submit(file, offset, length, buffer.memory[:length])
        self._reading.append((index, buffer, length, future))

    def _host_done(self) -> tuple[int, torch.Tensor]:
        index, buffer, length = self._finish()
        if length == self._blobs[index].length:
            self._check.verify(index, buffer.memory)
        return index, buffer.tensor

    def _finish(self) -> tuple[int, HostBuffer, int]:
        """Wait for the oldest range. Raises StoreError."""
        index, buffer, length, future = self._reading[0]
        blob = self._blobs[index]
        finish_read(future, blob.unit, self._directory / blob.file, length, self._timeout_s)
        self._reading.popleft()
        self._stats.bytes_read += length
        return index, buffer, length
