"""The header of a .safetensors file, parsed as hostile input: 8 bytes of length, JSON, then data without gaps."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from partition.checkpoint_index import FileHeader, TensorEntry
from partition.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


def read_safetensors_header(path: Path) -> FileHeader:
    """All tensors of the file, from its header alone. Raises CheckpointError for anything not exactly right."""
    try:
        with path.open("rb") as file:
            file_size = path.stat().st_size
            length_field = file.read(8)
            if len(length_field) < 8:
                raise CheckpointError(f"{path} is truncated: {file_size} bytes, a header starts with 8 bytes of length")
            length = int.from_bytes(length_field, "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: the header claims {length} bytes, more than {MAX_HEADER_BYTES} allowed")
            if 8 + length > file_size:
                raise CheckpointError(
                    f"{path} is truncated: its header needs {8 + length} bytes, the file has {file_size}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    header = parse_json_object(text, where=f"{path}: header")
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, value, 8 + length) for name, value in header.items()]
    _check_cover(path, tensors, 8 + length, file_size)
    return FileHeader(tensors=tuple(tensors), digest=hashlib.sha256(length_field + text).hexdigest())


def parse_json_object(text: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises CheckpointError."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:100]!r} is there twice")
            seen.add(name)
    return found


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where} has the unknown dtype {str(dtype)[:50]!r}")
    if not _whole_numbers(shape) or len(shape) > 16:
        raise CheckpointError(f"{where} has the shape {str(shape)[:100]}, which is no list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the data_offsets {str(offsets)[:100]}, which are no [start, end]")
    need = math.prod(shape) * DTYPE_BYTES[dtype]
    if need != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: shape {str(shape)[:100]} of {dtype} is {need} bytes, its data_offsets hold "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        file=path.name,
        start=data_start + offsets[0],
        end=data_start + offsets[1],
    )


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(path: Path, tensors: list[TensorEntry], data_start: int, file_size: int) -> None:
    """The tensors cover the data section exactly once, and the file ends with it."""
    at = data_start
    for entry in sorted(tensors, key=lambda entry: (entry.start, entry.end)):
        if entry.start != at:
            what = "overlaps the tensor before it" if entry.start < at else f"leaves a hole of {entry.start - at} bytes"
            raise CheckpointError(f"{path}: tensor {entry.name[:200]!r} {what}")
        at = entry.end
    if at != file_size:
        what = "is truncated" if file_size < at else "has trailing bytes"
        raise CheckpointError(
            f"{path} {what}: its header describes {at} bytes, the file has {file_size}: fetch it again"
        )
