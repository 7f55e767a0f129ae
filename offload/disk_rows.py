"""An embedding that stays on disk: a pass needs a few of its rows, so only those are read.

    ids 7 3 7 ──> unique 3 7 ──> the pages around rows 3 and 7, many reads in flight ──> rows of ids

A row read waits behind the blocks that the disk is busy with (milliseconds), never behind the queue of units: rows
have a reader of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from offload.aligned import aligned_memory
from offload.check import finish_read
from offload.dtypes import dtype_named
from offload.format import BlobEntry
from offload.readers.port import Reader, ReadFile
from offload.stats import StreamStats
from partition.layout import ALIGN_BLOB, round_up
from partition.plan_data import ROW_STAGING_BYTES


class DiskRows:
    """A matrix [rows, width] in a blob, of which `torch.nn.functional.embedding` takes rows. Used by one thread.

    It stands in an embedding module's place for the weight; any other use of it as a tensor is refused.
    """

    def __init__(
        self,
        *,
        directory: Path,
        blob: BlobEntry,
        array: int,
        reader: Reader,
        stats: StreamStats,
        timeout_s: float,
    ) -> None:
        layout = blob.tensors[array]
        if layout.encoded is not None or len(layout.shape) != 2:
            raise ValueError(f"{blob.unit}: {layout.name} {layout.shape} has no rows that can be read one by one")
        self._file = ReadFile(directory / blob.file)
        self._unit = blob.unit
        self._offset = layout.offset
        self._length = blob.length
        self._reader = reader
        self._stats = stats
        self._timeout_s = timeout_s
        self.shape = torch.Size(layout.shape)
        self.dtype = dtype_named(layout.dtype)
        self._row_bytes = layout.num_bytes // layout.shape[0] if layout.shape[0] else 0

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.embedding and len(args) > 1 and isinstance(args[1], cls):
            return args[1].rows(args[0])
        raise TypeError(f"{func} on an embedding that is on disk: only its rows can be looked up")

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[...] row numbers on the CPU -> [..., width].

        Raises:
            IndexError: there is no such row.
            StoreError: a read failed, came up short, or was not done in time.
        """
        unique, places = torch.unique(token_ids, return_inverse=True)
        wanted = unique.tolist()
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.shape[0]:
            raise IndexError(f"rows {wanted[0]} to {wanted[-1]} of an embedding of {self.shape[0]}")
        if not wanted:
            return torch.empty((*token_ids.shape, self.shape[1]), dtype=self.dtype)
        found = torch.empty((len(wanted), self.shape[1]), dtype=self.dtype)
        target = memoryview(found.view(torch.uint8).numpy().data).cast("B")
        per_round = max(1, ROW_STAGING_BYTES // (round_up(self._row_bytes, ALIGN_BLOB) + ALIGN_BLOB))
        for first in range(0, len(wanted), per_round):
            self._read(wanted[first : first + per_round], target[first * self._row_bytes :])
        return found[places]

    def _read(self, rows: Sequence[int], target: memoryview) -> None:
        """The bytes of these rows, one after another, into `target`."""
        spans = []  # start in the file, bytes, where the row begins in it
        for row in rows:
            begin = self._offset + row * self._row_bytes
            start = begin // ALIGN_BLOB * ALIGN_BLOB
            end = min(round_up(begin + self._row_bytes, ALIGN_BLOB), self._length)
            spans.append((start, end - start, begin - start))
        staging = aligned_memory(sum(length for _, length, _ in spans))
        reads, position = [], 0
        for start, length, within in spans:
            piece = staging[position : position + length]
            reads.append((self._reader.submit(self._file, start, length, piece), piece, within))
            position += length
        for number, (future, piece, within) in enumerate(reads):
            finish_read(future, self._unit, self._file.path, len(piece), self._timeout_s)
            at = number * self._row_bytes
            target[at : at + self._row_bytes] = piece[within : within + self._row_bytes]
        self._stats.bytes_read += position


def disk_rows(
    directory: Path, blob: BlobEntry, reader: Reader, stats: StreamStats, timeout_s: float
) -> Mapping[str, DiskRows]:
    """The blob's matrices by name, none of them read yet. Raises ValueError when one is no plain matrix."""
    return {
        layout.name: DiskRows(
            directory=directory, blob=blob, array=number, reader=reader, stats=stats, timeout_s=timeout_s
        )
        for number, layout in enumerate(blob.tensors)
    }
