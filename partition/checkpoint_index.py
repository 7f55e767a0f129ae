"""What a checkpoint holds, as data: its files, tensors and config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """`shape` in row-major order (rows first, also for GGUF). Bytes [start, end) of `file` hold the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class FileHeader:
    """What the header of one file says. `digest`: sha256 of the header's bytes."""

    tensors: tuple[TensorEntry, ...]
    digest: str


@dataclass(frozen=True, kw_only=True)
class FileFact:
    """One weight file as it was found; `name` is relative to the checkpoint's directory."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class CheckpointIndex:
    """A checkpoint's content. `path` is what was opened; files lie in it, or beside it when it is a file.

    `fingerprint` changes when the config, a header, a file's size or mtime, or sampled weight bytes change; a single
    changed byte under a restored mtime may go unseen. `content` is the same without the mtimes: equal for copies.
    kind "config_only" can be planned, not launched.
    """

    path: Path
    kind: Literal["safetensors", "gguf", "config_only"]
    files: tuple[FileFact, ...]
    tensors: dict[str, TensorEntry]
    config: dict[str, Any]
    fingerprint: str
    content: str

    @property
    def directory(self) -> Path:
        """Where `files` lie."""
        return self.path if self.path.is_dir() else self.path.parent
