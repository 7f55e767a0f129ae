"""Writing one blob: bounded pieces, hashed on the way, on disk under its own name only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from offload.digest import Digest
from offload.dtypes import name_of
from offload.encoded import EncodedTensor
from offload.format import TMP_SUFFIX, BlobEntry, EncodedPart, TensorLayout, blob_file
from offload.slots import page_buffer
from partition.encoding import parts_of
from partition.errors import StoreError
from partition.layout import blob_layout
from partition.sizes import format_size

Weights = Mapping[str, torch.Tensor | EncodedTensor]
"""A unit's tensors by parameter name, each in its at-rest form."""

PIECE_BYTES = 16 * 2**20
"""Bytes gathered at once from a tensor that is not contiguous: what packing needs beside the unit itself."""

FLUSH_BYTES = 64 * 2**20
"""Bytes written before they are forced to disk and dropped: dirty pages count against a memory cgroup."""

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def free_bytes(directory: Path) -> int:
    """Bytes an ordinary user may still write to the file system of `directory`."""
    facts = os.statvfs(directory)
    return facts.f_bavail * facts.f_frsize


def out_of_space(directory: Path, need: int, reason: str) -> StoreError:
    """The error of a full disk: what is still to be written, what is free, what to do."""
    free = free_bytes(directory)
    return StoreError(
        f"packing into {directory} needs {format_size(need)} ({need} bytes) more, free are {format_size(free)} "
        f"({free} bytes): {reason}. Free some space or choose another `offload.store`, then run it again: "
        "finished units are kept"
    )


def layout_of(unit: str, tensors: Weights) -> tuple[tuple[TensorLayout, ...], int]:
    """Where each array goes, in the mapping's order, and the blob's length in bytes.

    Raises:
        ValueError: a tensor is not on the CPU or of a type that cannot be stored (an error of the source).
    """
    arrays = list(_arrays(tensors))
    for name, _, tensor in arrays:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            raise ValueError(f"{unit}: {name} is a {tensor.layout} tensor on {tensor.device}, not a dense one on cpu")
    offsets, length = blob_layout([tensor.numel() * tensor.itemsize for _, _, tensor in arrays])
    layouts = tuple(
        TensorLayout(
            name=name,
            dtype=name_of(tensor.dtype),
            shape=tuple(tensor.shape),
            offset=offset,
            num_bytes=tensor.numel() * tensor.itemsize,
            encoded=encoded,
        )
        for (name, encoded, tensor), offset in zip(arrays, offsets, strict=True)
    )
    return layouts, length


def _arrays(tensors: Weights) -> Iterator[tuple[str, EncodedPart | None, torch.Tensor]]:
    """What is stored, in order: a tensor as it is, an encoded one as its parts."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            yield name, None, tensor
            continue
        for part in parts_of(tensor.encoding, tuple(tensor.shape)):
            yield (
                name,
                EncodedPart(
                    encoding=tensor.encoding,
                    part=part.name,
                    dtype=name_of(tensor.dtype),
                    shape=tuple(tensor.shape),
                ),
                tensor.codes if part.name == "codes" else tensor.scales,
            )


def write_blob(
    directory: Path,
    unit: str,
    tp_rank: int,
    tensors: Weights,
    advance: Callable[[int], None],
) -> BlobEntry:
    """Write one blob and rename it into place; `advance` gets the bytes of each piece written.

    Peak memory: PIECE_BYTES beside the tensors. On any error the unfinished file is removed.

    Raises:
        OSError: as the disk reports it.
    """
    layouts, length = layout_of(unit, tensors)
    path = directory / blob_file(unit, tp_rank)
    tmp = path.with_name(path.name + TMP_SUFFIX)
    try:
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            if length:
                os.posix_fallocate(fd, 0, length)  # a full disk is noticed here, and the extents are long
            digest = Digest()
            position = unflushed = 0
            for piece in _pieces_of_blob(layouts, length, tensors):
                _write_all(fd, piece, position)
                digest.update(piece)
                position += piece.nbytes
                unflushed += piece.nbytes
                advance(piece.nbytes)
                if unflushed >= FLUSH_BYTES:
                    os.fdatasync(fd)
                    os.posix_fadvise(fd, 0, position, os.POSIX_FADV_DONTNEED)
                    unflushed = 0
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        os.rename(tmp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            tmp.unlink()
        raise
    sync_directory(directory)
    return BlobEntry(unit=unit, tp_rank=tp_rank, file=path.name, length=length, digest=digest.hex(), tensors=layouts)


def write_small(path: Path, data: bytes) -> None:
    """Write a file of a few kilobytes so that it exists completely or not at all, also after a power cut."""
    tmp = path.with_name(path.name + TMP_SUFFIX)
    try:
        with open(tmp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(tmp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            tmp.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tensor_pieces(tensor: torch.Tensor, staging: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a CPU tensor in row-major order, in pieces no longer than `staging` (uint8, at least an element).

    A contiguous tensor is not copied; others go through `staging`, so a piece is valid until the next one is asked for.
    """
    tensor = tensor.detach()
    num_bytes = tensor.numel() * tensor.itemsize
    max_bytes = staging.numel() // tensor.itemsize * tensor.itemsize
    if num_bytes == 0:
        return
    if tensor.is_contiguous():
        # as_strided: a dimension of size 1 may carry any stride, over which reshape keeps and view stumbles
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
        for start in range(0, num_bytes, max_bytes):
            yield flat[start : start + max_bytes]
    elif num_bytes <= max_bytes:
        # not .contiguous(): pieces from the heap fragment it, and memory grows with every unit
        copied = staging[:num_bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        yield from tensor_pieces(copied, staging)
    elif tensor.shape[0] == 1:
        yield from tensor_pieces(tensor[0], staging)
    else:
        rows = max(1, max_bytes // (num_bytes // tensor.shape[0]))
        for start in range(0, tensor.shape[0], rows):
            yield from tensor_pieces(tensor[start : start + rows], staging)


def _pieces_of_blob(layouts: tuple[TensorLayout, ...], length: int, tensors: Weights) -> Iterator[memoryview]:
    position = 0
    staging = page_buffer(PIECE_BYTES).tensor  # not touched, so not there, while all tensors are contiguous
    for layout, (_, _, tensor) in zip(layouts, _arrays(tensors), strict=True):
        yield from _padding(layout.offset - position)
        yield from tensor_pieces(tensor, staging)
        position = layout.offset + layout.num_bytes
    yield from _padding(length - position)


def _padding(num_bytes: int) -> Iterator[memoryview]:
    if num_bytes:
        yield memoryview(bytes(num_bytes))


def _write_all(fd: int, piece: memoryview, offset: int) -> None:
    while piece.nbytes:
        written = os.pwrite(fd, piece, offset)
        piece, offset = piece[written:], offset + written
