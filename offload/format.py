"""The packed store on disk: what its JSON files say, where its blobs lie, and when it is refused.

    <directory>/<unit>.tp<r>.bin    the bytes of one unit for one tensor-parallel rank; see partition.layout
    <directory>/<unit>.tp<r>.json   that blob's entry, written when the blob is safely on disk: what a restart trusts
    <directory>/manifest.json       all entries; written last, so a store with a manifest is complete

Every JSON file carries the store's key, so that a file copied from another store is noticed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from offload.digest import digest_of
from partition.encoding import parts_of
from partition.errors import StoreError
from partition.layout import blob_layout

FORMAT_VERSION = 4
MANIFEST_FILE = "manifest.json"
LOCK_FILE = "pack.lock"
TMP_SUFFIX = ".tmp"

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""The element types a store may hold, by torch's names, and their bytes."""

_UNIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STRICT = ConfigDict(extra="forbid", strict=True)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StoreKey:
    """What the packed bytes depend on besides the format: two stores with equal keys hold equal bytes."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    fingerprint: str  # of the source checkpoint
    model_type: str
    dtype: str  # of computation
    encoding: str  # at rest
    tensor: int  # number of tensor-parallel ranks the weights are cut for


@dataclass(frozen=True, kw_only=True)
class EncodedPart:
    """An array that is one part ("codes", "scales") of a tensor of `shape`, computed with in `dtype`."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    encoding: str
    part: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """One array inside a blob: bytes [offset, offset + num_bytes), elements in row-major order.

    `name` is the parameter's; the parts of an encoded one stand one after another, as partition.encoding orders them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    encoded: EncodedPart | None = None


@dataclass(frozen=True, kw_only=True)
class BlobEntry:
    """One blob: `length` bytes of file `file` (a name inside the store's directory), `digest` of all of them."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    unit: str
    tp_rank: int
    file: str
    length: int
    digest: str
    tensors: tuple[TensorLayout, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All blobs of a store, ordered by unit name and rank; `digest` covers everything else that is in here."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    version: int
    key: StoreKey
    blobs: tuple[BlobEntry, ...]
    digest: str

    def blob(self, unit: str, tp_rank: int) -> BlobEntry:
        """The entry of one blob. Raises StoreError when the store does not hold it."""
        for entry in self.blobs:
            if entry.unit == unit and entry.tp_rank == tp_rank:
                return entry
        raise StoreError(
            f"the packed store has no unit {unit!r} for tensor rank {tp_rank}; it holds {len(self.blobs)} blobs. "
            "Run `dist-infer pack` again"
        )


@dataclass(frozen=True, kw_only=True)
class _EntryFile:
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    version: int
    key: StoreKey
    blob: BlobEntry


_MANIFEST = TypeAdapter(Manifest)
_ENTRY_FILE = TypeAdapter(_EntryFile)


def blob_file(unit: str, tp_rank: int) -> str:
    """File name of a blob. Raises ValueError when the unit's name cannot be a file name."""
    if not _UNIT_NAME.fullmatch(unit) or tp_rank < 0:
        raise ValueError(f"unit {unit!r}, rank {tp_rank}: a unit is named with letters, digits, '.', '_' and '-'")
    return f"{unit}.tp{tp_rank}.bin"


def entry_file(unit: str, tp_rank: int) -> str:
    """File name of a blob's entry."""
    return f"{blob_file(unit, tp_rank).removesuffix('.bin')}.json"


def store_directory(root: Path, name: str, key: StoreKey) -> Path:
    """Where the store of `name` with this key lies under `root`; other keys and formats get other directories."""
    digest = digest_of(_json({"version": FORMAT_VERSION, "key": asdict(key)}))
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    return root / f"{readable}-{digest[:12]}"


def make_manifest(key: StoreKey, blobs: Iterable[BlobEntry]) -> Manifest:
    """The manifest of these blobs; the same blobs in another order give the same manifest."""
    ordered = tuple(sorted(blobs, key=lambda entry: (entry.unit, entry.tp_rank)))
    return Manifest(version=FORMAT_VERSION, key=key, blobs=ordered, digest=_manifest_digest(key, ordered))


def manifest_json(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    return _json(asdict(manifest))


def entry_json(key: StoreKey, blob: BlobEntry) -> bytes:
    """The bytes of a blob's entry file."""
    return _json(asdict(_EntryFile(version=FORMAT_VERSION, key=key, blob=blob)))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a store, checked against itself.

    Raises:
        StoreError: there is none, it is of another format, damaged, or contradicts itself.
    """
    path = directory / MANIFEST_FILE
    manifest = _read(path, _MANIFEST)
    for blob in manifest.blobs:
        _check_blob(path, blob)
    if manifest.digest != _manifest_digest(manifest.key, manifest.blobs):
        raise StoreError(f"{path} was changed after it was written (its checksum differs): delete it and pack again")
    if len({(blob.unit, blob.tp_rank) for blob in manifest.blobs}) != len(manifest.blobs):
        raise StoreError(f"{path} lists a blob twice: delete it and pack again")
    return manifest


def read_entry(directory: Path, unit: str, tp_rank: int, key: StoreKey) -> BlobEntry:
    """The entry of one blob; the blob itself is not looked at.

    Raises:
        StoreError: there is none, it is damaged, or it belongs to a store with another key.
    """
    path = directory / entry_file(unit, tp_rank)
    found = _read(path, _ENTRY_FILE)
    check_key(path, found.key, key)
    _check_blob(path, found.blob)
    if (found.blob.unit, found.blob.tp_rank) != (unit, tp_rank):
        raise StoreError(f"{path} describes {found.blob.file}: delete it and pack again")
    return found.blob


def open_store(directory: Path, key: StoreKey, units: Sequence[str], tp_ranks: Sequence[int]) -> Manifest:
    """The manifest of a complete store that has every wanted blob, each with the right file size; reads no weights.

    Raises:
        StoreError: naming the field of the key that differs, or the file and its expected and actual size.
    """
    manifest = read_manifest(directory)
    check_key(directory / MANIFEST_FILE, manifest.key, key)
    for unit in units:
        for tp_rank in tp_ranks:
            blob = manifest.blob(unit, tp_rank)
            path = directory / blob.file
            size = file_size(path)
            if size != blob.length:
                there = "is missing" if size is None else f"has {size} bytes"
                raise StoreError(f"{path} {there}, its entry says {blob.length} bytes: run `dist-infer pack` again")
    return manifest


def check_key(path: Path, actual: StoreKey, expected: StoreKey) -> None:
    """Raises StoreError with every field in which the two keys differ."""
    differing = [
        f"{field.name} is {getattr(actual, field.name)!r}, expected {getattr(expected, field.name)!r}"
        for field in fields(StoreKey)
        if getattr(actual, field.name) != getattr(expected, field.name)
    ]
    if differing:
        raise StoreError(
            f"{path} belongs to another store: {'; '.join(differing)}. "
            "Pack into another directory, or delete this store and pack again"
        )


def file_size(path: Path) -> int | None:
    """Bytes of a regular file, None when there is none."""
    try:
        return os.stat(path).st_size if path.is_file() else None
    except FileNotFoundError:
        return None


def _json(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def _manifest_digest(key: StoreKey, blobs: Sequence[BlobEntry]) -> str:
    return digest_of(_json({"version": FORMAT_VERSION, "key": asdict(key), "blobs": [asdict(blob) for blob in blobs]}))


def _read(path: Path, adapter: TypeAdapter[T]) -> T:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist: the store was never finished. Run `dist-infer pack`") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    try:
        version = json.loads(data)["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} is no description of a packed store ({error!r}): delete it and pack again") from error
    if version != FORMAT_VERSION:
        raise StoreError(f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}: pack again")
    try:
        return adapter.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{path} is damaged at {where!r} ({first['msg']}): delete it and pack again") from error


def _check_blob(path: Path, blob: BlobEntry) -> None:
    """The entry must agree with the layout rule, or views of the blob would show the wrong bytes."""
    wrong = _contradiction(blob)
    if wrong is not None:
        raise StoreError(f"{path} contradicts itself in unit {blob.unit!r}: {wrong}. Delete it and pack again")


def _contradiction(blob: BlobEntry) -> str | None:
    try:
        if blob.file != blob_file(blob.unit, blob.tp_rank):
            return f"the file is called {blob.file!r}"
        for tensor in blob.tensors:
            if tensor.dtype not in DTYPE_BYTES:
                return f"{tensor.name} has the unknown dtype {tensor.dtype!r}"
            if min(tensor.shape, default=0) < 0:
                return f"{tensor.name} has shape {tensor.shape}"
            if tensor.num_bytes != prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]:
                return f"{tensor.name} of {tensor.dtype} {tensor.shape} cannot have {tensor.num_bytes} bytes"
        offsets, length = blob_layout([tensor.num_bytes for tensor in blob.tensors])
        if length != blob.length or offsets != tuple(tensor.offset for tensor in blob.tensors):
            return f"its tensors need {length} bytes at {offsets}, it has {blob.length}"
        return _wrong_parts(blob.tensors)
    except ValueError as error:
        return str(error)


def _wrong_parts(arrays: Sequence[TensorLayout]) -> str | None:
    """Every tensor once, and an encoded one with all of its parts, in order."""
    seen: set[str] = set()
    for name, group in groupby(arrays, key=lambda array: array.name):
        own = tuple(group)
        if name in seen or (len(own) > 1 and own[0].encoded is None):
            return f"{name} is listed twice"
        seen.add(name)
        whole = own[0].encoded
        if whole is None:
            continue
        there = [(a.encoded.part if a.encoded else "", a.dtype, a.shape) for a in own]
        if whole.dtype not in DTYPE_BYTES or there != [
            (part.name, part.dtype, part.shape) for part in parts_of(whole.encoding, whole.shape)
        ]:
            return f"{name} of {whole.encoding} {whole.shape} {whole.dtype} cannot have the parts {there}"
        if any(a.encoded != replace(whole, part=a.encoded.part if a.encoded else "") for a in own):
            return f"the parts of {name} disagree"
    return None
