"""The header of a .gguf file, parsed as hostile input: metadata and tensor descriptions, never the data.

Long arrays (the vocabulary) are stepped over, not kept; only their length is.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from partition.checkpoint_index import FileHeader, TensorEntry
from partition.errors import CheckpointError, UnsupportedModelError
from partition.gguf_types import TENSOR_TYPES

MAX_HEADER_BYTES = 256 << 20
_CHUNK_BYTES = 4 << 20
_MAX_NAME_BYTES = 65_535
_MAX_TEXT_BYTES = 16 << 20
_MAX_KEPT_ITEMS = 4096
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, kw_only=True)
class SkippedArray:
    """An array whose items were not kept."""

    length: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader(FileHeader):
    """`metadata`: key -> number, bool, text, short list, or SkippedArray."""

    metadata: dict[str, Any]


def read_gguf_header(path: Path) -> GgufHeader:
    """All metadata and tensors of the file. Raises CheckpointError for anything damaged."""
    try:
        with path.open("rb") as file:
            return _read(path, file, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _read(path: Path, file: BinaryIO, file_size: int) -> GgufHeader:
    cursor = _Cursor(path, file, file_size)
    if bytes(cursor.take(4)) != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    (version,) = cursor.unpack("I")
    if version not in (2, 3):
        raise UnsupportedModelError(f"{path} is GGUF version {version}, only 2 and 3 (little-endian) can be read")
    num_tensors, num_keys = cursor.unpack("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text(_MAX_NAME_BYTES)
        if key in metadata:
            raise CheckpointError(f"{path}: the metadata key {key[:200]!r} is there twice")
        metadata[key] = _value(cursor, key)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {str(alignment)[:50]}, but must be a power of two")
    described = [_described(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors = _place(path, described, data_start, alignment, file_size)
    return GgufHeader(tensors=tensors, digest=cursor.digest(), metadata=metadata)


class _Cursor:
    """Reads forward through the header in chunks; every request is checked against the file's end."""

    def __init__(self, path: Path, file: BinaryIO, file_size: int) -> None:
        self.path = path
        self.position = 0  # in the file
        self._file, self._file_size = file, file_size
        self._buffer, self._at = b"", 0
        self._hash = hashlib.sha256()

    def take(self, num_bytes: int) -> memoryview:
        self._need(num_bytes)
        view = memoryview(self._buffer)[self._at : self._at + num_bytes]
        self._at += num_bytes
        self.position += num_bytes
        return view

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def text(self, most: int) -> str:
        (length,) = self.unpack("Q")
        if length > most:
            raise CheckpointError(f"{self.path}: a text of {length} bytes at {self.position}, more than {most} allowed")
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: the text at {self.position} is not UTF-8") from error

    def skip(self, num_bytes: int) -> None:
        while num_bytes:
            step = min(num_bytes, _CHUNK_BYTES)
            self.take(step)
            num_bytes -= step

    def skip_texts(self, count: int) -> None:
        """The hot path: a vocabulary is a hundred thousand of these."""
        length_of = struct.Struct("<Q").unpack_from
        while count:
            self._need(8)
            buffer, at, end = self._buffer, self._at, len(self._buffer)
            start = at
            while count and at + 8 <= end:
                after = at + 8 + length_of(buffer, at)[0]
                if after > end:
                    break
                at = after
                count -= 1
            self._at = at
            self.position += at - start
            if count and at == start:  # the next text reaches beyond the buffer
                (length,) = self.unpack("Q")
                if length > _MAX_TEXT_BYTES:
                    raise CheckpointError(f"{self.path}: a text of {length} bytes at {self.position}")
                self.skip(length)
                count -= 1

    def digest(self) -> str:
        """Of everything read so far: sha256."""
        self._hash.update(self._buffer[: self._at])
        return self._hash.hexdigest()

    def _need(self, num_bytes: int) -> None:
        missing = self._at + num_bytes - len(self._buffer)
        if missing <= 0:
            return
        if self.position + num_bytes > self._file_size:
            raise CheckpointError(
                f"{self.path} is truncated: its header reaches beyond byte {self.position + num_bytes}, "
                f"the file has {self._file_size}: fetch it again"
            )
        if self.position + num_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.path}: the header is longer than {MAX_HEADER_BYTES} bytes")
        self._hash.update(self._buffer[: self._at])
        self._buffer = self._buffer[self._at :] + self._file.read(max(missing, _CHUNK_BYTES))
        self._at = 0
        if len(self._buffer) < num_bytes:
            raise CheckpointError(f"{self.path} became shorter while it was read")


def _value(cursor: _Cursor, key: str) -> Any:
    (kind,) = cursor.unpack("I")
    if kind in _SCALARS:
        return cursor.unpack(_SCALARS[kind])[0]
    if kind == _STRING:
        return cursor.text(_MAX_TEXT_BYTES)
    if kind != _ARRAY:
        raise CheckpointError(f"{cursor.path}: the metadata key {key[:200]!r} has the unknown type {kind}")
    item, length = cursor.unpack("IQ")
    if item == _STRING:
        cursor.skip_texts(length)
        return SkippedArray(length=length)
    if item not in _SCALARS:
        raise CheckpointError(f"{cursor.path}: the array {key[:200]!r} has items of the unknown type {item}")
    if length <= _MAX_KEPT_ITEMS:
        return list(cursor.unpack(f"{length}{_SCALARS[item]}"))
    cursor.skip(length * struct.calcsize("<" + _SCALARS[item]))
    return SkippedArray(length=length)


def _described(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (rows first), type id, offset from the data's start."""
    name = cursor.text(_MAX_NAME_BYTES)
    (num_dims,) = cursor.unpack("I")
    if num_dims > 4:
        raise CheckpointError(f"{cursor.path}: tensor {name[:200]!r} has {num_dims} dimensions, at most 4 are allowed")
    dims = cursor.unpack(f"{num_dims}Q")
    kind, offset = cursor.unpack("IQ")
    return name, tuple(reversed(dims)), kind, offset


def _place(
    path: Path,
    described: list[tuple[str, tuple[int, ...], int, int]],
    data_start: int,
    alignment: int,
    file_size: int,
) -> tuple[TensorEntry, ...]:
    entries: dict[str, TensorEntry] = {}
    for name, shape, kind, offset in described:
        where = f"{path}: tensor {name[:200]!r}"
        if kind not in TENSOR_TYPES:
            raise CheckpointError(f"{where} has the unknown type {kind}")
        if name in entries:
            raise CheckpointError(f"{where} is there twice")
        dtype, block, block_bytes = TENSOR_TYPES[kind]
        row = shape[-1] if shape else 1
        if row % block:
            raise CheckpointError(f"{where}: rows of {row} elements are no multiple of {dtype}'s block of {block}")
        size = math.prod(shape) // block * block_bytes
        start = data_start + offset
        entries[name] = TensorEntry(name=name, dtype=dtype, shape=shape, file=path.name, start=start, end=start + size)
    at = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        expected = -(-at // alignment) * alignment
        if entry.start != expected:
            what = "overlaps the tensor before it" if entry.start < expected else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {entry.name[:200]!r} {what}: it starts at byte {entry.start}, not {expected}"
            )
        at = entry.end
    if entries and not at <= file_size <= -(-at // alignment) * alignment:
        what = "is truncated" if file_size < at else "has trailing bytes"
        raise CheckpointError(
            f"{path} {what}: its header describes {at} bytes, the file has {file_size}: fetch it again"
        )
    return tuple(entries.values())
