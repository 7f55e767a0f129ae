"""One tensor of a checkpoint file, as its header describes it."""

from __future__ import annotations

from dataclasses import dataclass


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
