"""Where a unit may be cut, so that its first parameters stay in memory and only the others are read in every pass.

    blob          | q_proj   | k | v | o_proj   | gate_proj         | …          |
    pages         |----|----|----|----|----|----|----|----|----|----|----|----|----|
    kept          [0 ─────────────────────────→ kept_bytes)
    streamed                               [streamed_from ───────────→ num_bytes)

Both edges are multiples of 4096, so the page in which the cut lies may be in both parts. Every array is whole in one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from partition.blob_spec import BlobArray
from partition.layout import ALIGN_BLOB, blob_layout, round_up

_LEAST_GAIN = 64  # a cut is worth its place only if it saves this fraction of the unit over the cut before


@dataclass(frozen=True, kw_only=True)
class CutPoint:
    """Bytes [0, kept_bytes[r]) of rank r's blob stay, [streamed_from[r], its end) are read in every pass."""

    kept_bytes: tuple[int, ...]
    streamed_from: tuple[int, ...]


def cut_points(blobs: Sequence[Sequence[BlobArray]]) -> tuple[CutPoint, ...]:
    """The useful cuts of a unit, least kept first. blobs[tp_rank]: its arrays; all ranks keep the same parameters.

    Keeping nothing and keeping all are not among them. A parameter's codes and scales are never parted.
    """
    layouts = [blob_layout([array.num_bytes for array in arrays]) for arrays in blobs]
    total = sum(length for _, length in layouts)
    edges = [_edges(arrays, offsets) for arrays, (offsets, _) in zip(blobs, layouts, strict=True)]
    points: list[CutPoint] = []
    saved = 0
    for at in zip(*edges, strict=True):
        kept = tuple(round_up(end, ALIGN_BLOB) for end, _ in at)
        streamed_from = tuple(start // ALIGN_BLOB * ALIGN_BLOB for _, start in at)
        if any(stays >= length for stays, (_, length) in zip(kept, layouts, strict=True)):
            break
        if (sum(streamed_from) - saved) * _LEAST_GAIN >= total > 0:
            points.append(CutPoint(kept_bytes=kept, streamed_from=streamed_from))
            saved = sum(streamed_from)
    return tuple(points)


def _edges(arrays: Sequence[BlobArray], offsets: Sequence[int]) -> list[tuple[int, int]]:
    """(end of a parameter, start of the next one) in bytes, for each parameter but the last."""
    return [
        (offset + array.num_bytes, following)
        for (array, offset), (after, following) in itertools.pairwise(zip(arrays, offsets, strict=True))
        if array.parameter != after.parameter
    ]
