"""A parameter's parts for tensor ranks, each in its at-rest encoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.encoded import EncodedTensor
from offload.quantize import encode
from partition.encoding import RAW, ROWS_PER_TILE, parts_of
from partition.errors import CheckpointError
from partition.sharding import AxisCut, ParameterSpec, shard_intervals

Stored = torch.Tensor | EncodedTensor


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One tensor rank's part of a parameter: its encoding ("raw" for none) and its shape."""

    tp_rank: int
    encoding: str
    shape: tuple[int, ...]


class ParameterReader(Protocol):
    """One kind of checkpoint. Peak memory: a parameter as stored, as converted, and the parts that are asked for."""

    def require(self, names: set[str]) -> None:
        """Raises CheckpointError unless the checkpoint has a tensor for every parameter."""
        ...

    def parts(self, parameter: ParameterSpec, cut: AxisCut, wanted: Sequence[Wanted]) -> list[Stored]:
        """The parameter for each wanted rank. Raises CheckpointError naming tensor and file."""
        ...


def shard_tensor(tensor: torch.Tensor, parameter: ParameterSpec, cut: AxisCut, tp_rank: int) -> torch.Tensor:
    """What a tensor rank holds of a parameter; a view where one interval is cut along the first dimension."""
    if parameter.split is None:
        return torch.zeros_like(tensor) if parameter.once and tp_rank > 0 else tensor
    parts = [
        tensor.narrow(parameter.split.dim, first, end - first)
        for first, end in shard_intervals(parameter, cut, tp_rank)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=parameter.split.dim)


def kept_as(tensor: torch.Tensor, encoding: str, dtype: torch.dtype, *, where: str) -> Stored:
    """The tensor in an encoding that computes in `dtype`. Raises CheckpointError with `where`: its name and file."""
    if encoding == RAW:
        return tensor
    try:
        return encode(tensor, encoding, dtype)
    except ValueError as error:
        raise CheckpointError(
            f"{where} cannot be kept as {encoding}: {error}; with offload.encoding: float it is kept as it is"
        ) from error


class Assembly:
    """A part that is put together from consecutive rows: peak memory is the part and one piece."""

    def __init__(self, wanted: Wanted, dtype: torch.dtype) -> None:
        self._wanted, self._dtype = wanted, dtype
        if wanted.encoding == RAW:
            self._arrays = [torch.empty(wanted.shape, dtype=dtype).view(-1, wanted.shape[-1])]
            return
        self._arrays = [
            torch.empty(part.shape, dtype=getattr(torch, part.dtype))
            for part in parts_of(wanted.encoding, wanted.shape)
        ]

    def put(self, first_row: int, piece: Stored) -> None:
        """Rows from `first_row` on; of an encoding whole tiles of rows, but for the last."""
        if isinstance(piece, torch.Tensor):
            self._arrays[0][first_row : first_row + len(piece)] = piece
            return
        first = first_row // ROWS_PER_TILE
        for whole, array in zip(self._arrays, (piece.codes, piece.scales), strict=True):
            whole[first : first + len(array)] = array

    def done(self) -> Stored:
        """The part, once every row was put."""
        if self._wanted.encoding == RAW:
            return self._arrays[0].view(self._wanted.shape)
        codes, scales = self._arrays
        return EncodedTensor(
            encoding=self._wanted.encoding,
            shape=torch.Size(self._wanted.shape),
            dtype=self._dtype,
            codes=codes,
            scales=scales,
        )
