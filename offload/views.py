"""A unit's tensors as views of the buffers that its bytes are in: no copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch

from offload.disk_rows import DiskRows
from offload.dtypes import dtype_named
from offload.encoded import EncodedTensor
from offload.format import BlobEntry, TensorLayout
from partition.layout import ALIGN_BLOB

UnitWeights = Mapping[str, torch.Tensor | EncodedTensor] | Mapping[str, DiskRows]
"""What a unit computes from, by parameter name."""


@dataclass(frozen=True)
class Kept:
    """What stays of a unit that is streamed: its bytes [0, kept_bytes); [streamed_from, length) is read every pass.

    Both are multiples of 4096. Where an array ends between two of them, the up to 4095 bytes around it are in both.
    """

    kept_bytes: int = 0
    streamed_from: int = 0

    def check(self, blob: BlobEntry) -> None:
        """Raises ValueError unless every array of the blob is whole in one of the two."""
        if self.kept_bytes % ALIGN_BLOB or self.streamed_from % ALIGN_BLOB:
            raise ValueError(f"{blob.unit}: {self} are no multiples of {ALIGN_BLOB}")
        if not 0 <= self.streamed_from <= self.kept_bytes < self.streamed_from + 2 * ALIGN_BLOB:
            raise ValueError(f"{blob.unit}: {self} leave a hole, or read too much twice")
        if self.kept_bytes and self.kept_bytes >= blob.length:
            raise ValueError(f"{blob.unit}: {self} keep all of {blob.length} bytes: the unit is resident then")
        for array in blob.tensors:
            if array.offset + array.num_bytes > self.kept_bytes and array.offset < self.streamed_from:
                raise ValueError(f"{blob.unit}: {self} cut {array.name} in two")


def views_of(
    blob: BlobEntry, buffer: torch.Tensor, kept: torch.Tensor | None = None, split: Kept | None = None
) -> UnitWeights:
    """The blob's tensors by name. buffer: uint8, the blob's bytes from `split.streamed_from` on, at least as long.

    kept: uint8, the first `split.kept_bytes` of the blob.
    """
    split = split or Kept()

    def view(array: TensorLayout) -> torch.Tensor:
        end = array.offset + array.num_bytes
        if kept is not None and end <= split.kept_bytes:
            found = kept[array.offset : end]
        else:
            found = buffer[array.offset - split.streamed_from : end - split.streamed_from]
        return found.view(dtype_named(array.dtype)).view(array.shape)

    weights: dict[str, torch.Tensor | EncodedTensor] = {}
    for name, group in groupby(blob.tensors, key=lambda array: array.name):
        arrays = list(group)
        encoded = arrays[0].encoded
        if encoded is None:
            weights[name] = view(arrays[0])
            continue
        parts = {array.encoded.part: view(array) for array in arrays if array.encoded is not None}
        weights[name] = EncodedTensor(
            encoding=encoded.encoding,
            shape=torch.Size(encoded.shape),
            dtype=dtype_named(encoded.dtype),
            codes=parts["codes"],
            scales=parts["scales"],
        )
    return weights
