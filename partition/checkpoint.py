"""What lies in a checkpoint: names, dtypes, shapes, byte ranges. Reads headers, a few sample bytes, and no weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partition.checkpoint_index import CheckpointIndex, FileFact, TensorEntry
from partition.errors import CheckpointError, UnsupportedModelError
from partition.gguf_config import config_of
from partition.gguf_header import read_gguf_header
from partition.gguf_types import READABLE_TYPES
from partition.safetensors_header import parse_json_object, read_safetensors_header
from partition.tensor_check import check_tensors

__all__ = ["CheckpointIndex", "FileFact", "TensorEntry", "check_tensors", "open_checkpoint"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_CONFIG_BYTES = 16 << 20
_MAX_INDEX_BYTES = 100_000_000
_NUM_SAMPLES = 8
_SAMPLE_BYTES = 4096


def open_checkpoint(path: Path) -> CheckpointIndex:
    """Index a directory (config.json and safetensors, or config.json alone) or a .gguf file.

    Raises CheckpointError for anything missing, damaged or pickled.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{path} is a file, but a checkpoint is a directory with config.json, or a .gguf file"
            )
        return _open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}: give a directory with config.json, or a .gguf file")
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot list {path}: {error.strerror or error}") from error
    weights = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if "config.json" not in names:
        if len(ggufs) == 1 and not weights:
            return _open_gguf(path / ggufs[0])
        there = f"{len(ggufs)} GGUF files, name one of them" if ggufs else f"no config.json among {len(names)} entries"
        raise CheckpointError(f"{path} is not a checkpoint: {there}")
    config = parse_json_object(_read_small(path / "config.json", _MAX_CONFIG_BYTES), where=f"{path / 'config.json'}")
    if not weights and _INDEX not in names:
        if pickled := [name for name in names if name.endswith(_PICKLED) and not name.startswith("training_args")]:
            raise CheckpointError(
                f"{path} has only pickled weights ({pickled[0]}), which can run code when loaded: convert them to "
                f"safetensors"
            )
        return CheckpointIndex(
            path=path,
            kind="config_only",
            files=(),
            tensors={},
            config=config,
            fingerprint=_fingerprint(config, (), ()),
            content=_content(config, (), ()),
        )
    return _open_safetensors(path, config, weights, has_index=_INDEX in names)


def _open_safetensors(path: Path, config: dict[str, Any], weights: list[str], *, has_index: bool) -> CheckpointIndex:
    listed: dict[str, str] | None = None
    if has_index:
        listed = _read_index(path / _INDEX)
        weights = sorted(set(listed.values()))
        for name in weights:
            if not (path / name).is_file():
                count = sum(1 for file in listed.values() if file == name)
                raise CheckpointError(f"{path}: the shard {name} with {count} tensors is missing: fetch it again")
    elif _SINGLE in weights:
        weights = [_SINGLE]
    elif len(weights) > 1:
        raise CheckpointError(f"{path} has {len(weights)} safetensors files but no {_INDEX}: fetch it again")
    headers = [read_safetensors_header(path / name) for name in weights]
    for name in weights:
        _refuse_holes(path / name)
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        for entry in header.tensors:
            if entry.name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {entry.name!r} is in both {tensors[entry.name].file} and {entry.file}"
                )
            tensors[entry.name] = entry
    for name, file in (listed or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"{path}: {_INDEX} says that tensor {name!r} is in {file}, but it is not")
    if listed is not None:
        tensors = {name: entry for name, entry in tensors.items() if name in listed}
    files = tuple(_file_fact(path / name) for name in weights)
    digests = [header.digest + _sample(path / name) for name, header in zip(weights, headers, strict=True)]
    return CheckpointIndex(
        path=path,
        kind="safetensors",
        files=files,
        tensors=tensors,
        config=config,
        fingerprint=_fingerprint(config, files, digests),
        content=_content(config, files, digests),
    )


def _open_gguf(path: Path) -> CheckpointIndex:
    header = read_gguf_header(path)
    _refuse_holes(path)
    for entry in header.tensors:
        if entry.dtype not in READABLE_TYPES:
            raise UnsupportedModelError(
                f"{path}: tensor {entry.name[:200]!r} is of type {entry.dtype}, which cannot be turned into numbers "
                f"here: use a file of other types ({', '.join(sorted(READABLE_TYPES))})"
            )
    config = config_of(header, file=str(path))
    files = (_file_fact(path),)
    digests = [header.digest + _sample(path)]
    return CheckpointIndex(
        path=path,
        kind="gguf",
        files=files,
        tensors={entry.name: entry for entry in header.tensors},
        config=config,
        fingerprint=_fingerprint(config, files, digests),
        content=_content(config, files, digests),
    )


def _read_index(path: Path) -> dict[str, str]:
    listed = parse_json_object(_read_small(path, _MAX_INDEX_BYTES), where=f"{path}").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path} has no weight_map")
    for name, file in listed.items():
        # the name is joined to the directory, so it must not lead out of it
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {name[:200]!r} is said to be in {str(file)[:200]!r}, which is no shard"
            )
    return listed


def _read_small(path: Path, most: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > most:
            raise CheckpointError(f"{path} has {size} bytes, more than {most} allowed")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _file_fact(path: Path) -> FileFact:
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return FileFact(name=path.name, size=stat.st_size, mtime_ns=stat.st_mtime_ns)


def _sample(path: Path) -> str:
    """sha256 of a few pieces spread over the file: new weights under an old mtime are seen without reading them all."""
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for piece in range(_NUM_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * piece // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def _refuse_holes(path: Path) -> None:
    """A file of the right size may still not be there: space reserved by a download that was never finished.

    Such bytes read as zeros. Where a file system cannot tell (SEEK_HOLE), a file counts as written.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            with contextlib.suppress(OSError):
                hole = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
                if hole >= size:
                    return
                try:
                    end = os.lseek(file.fileno(), hole, os.SEEK_DATA)
                except OSError:  # ENXIO: no data behind it
                    end = size
                raise CheckpointError(
                    f"{path} was never written completely: bytes {hole} to {end} of {size} are a hole, only "
                    f"{os.fstat(file.fileno()).st_blocks * 512} bytes are on disk. Fetch it again; if they shall be "
                    "zeros, copy it to an ext4 or XFS disk with `cp --sparse=never`"
                )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _fingerprint(config: dict[str, Any], files: Sequence[FileFact], digests: Sequence[str]) -> str:
    facts = [[fact.name, fact.size, fact.mtime_ns, digest] for fact, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(json.dumps([config, facts], sort_keys=True).encode()).hexdigest()


def _content(config: dict[str, Any], files: Sequence[FileFact], digests: Sequence[str]) -> str:
    """The fingerprint without what copying changes."""
    facts = [[fact.name, fact.size, digest] for fact, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(json.dumps([config, facts], sort_keys=True).encode()).hexdigest()
