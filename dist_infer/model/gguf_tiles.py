"""Codes and scales in the tiles of partition.encoding, by numpy: the layout of offload.kernels.layout, bit for bit.

Several threads pack pieces of a tensor side by side; torch would start a team of its own in each of them. What are
8 columns of int4 or 4 of int8 in one row is one 32-bit word of a line, so words are moved about and not bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_infer.model.gguf_blocks import Bytes, Codes
from offload.encoded import EncodedTensor
from partition.encoding import ROWS_PER_TILE

_EVEN = np.uint64(0x000F000F000F000F)
_PAIRS = np.uint64(0x000000FF000000FF)
_HALF = np.uint64(0xFFFF)
_HALF_LARGEST = 65504.0


def scales_fit(found: Codes) -> bool:
    """Whether float16 holds all scales and minima; NaN and inf, as damaged blocks have them, do not fit either."""
    parts = (found.scales,) if found.minima is None else (found.scales, found.minima)
    return all(bool((np.abs(part) <= _HALF_LARGEST).all()) for part in parts)


def tiles_of(encoding: str, found: Codes, dtype: torch.dtype) -> EncodedTensor:
    """Codes [rows, columns] and their scales in "int4-g32" or "int8-g32"; the last tile is filled up with zeros.

    Raises ValueError for another encoding.
    """
    if encoding not in ("int4-g32", "int8-g32") or (found.minima is None) == (encoding == "int4-g32"):
        raise ValueError(f"blocks have no codes in {encoding}")
    words = _int4_words(found.codes) if encoding == "int4-g32" else _int8_words(found.codes)
    lines = _tiled(words)
    scales = _tiled(_halves(found.scales))
    if found.minima is not None:
        scales = np.stack([scales, _tiled(_halves(found.minima))], axis=2)
    return EncodedTensor(
        encoding=encoding,
        shape=torch.Size(found.codes.shape),
        dtype=dtype,
        codes=torch.from_numpy(lines.view(np.uint8)),
        scales=torch.from_numpy(scales),
    )


def _int4_words(codes: Bytes) -> NDArray[np.uint32]:
    """[rows, columns / 8]: columns 0 2 4 6 in the lower half of a word, 1 3 5 7 in the upper."""
    eight = np.ascontiguousarray(codes).view("<u8")
    return _every_other(eight) | _every_other(eight >> np.uint64(8)) << np.uint32(16)


def _every_other(eight: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The nibbles in bytes 0, 2, 4 and 6, side by side in 16 bits."""
    nibbles = eight & _EVEN
    nibbles |= nibbles >> np.uint64(12)
    nibbles &= _PAIRS
    nibbles |= nibbles >> np.uint64(24)
    nibbles &= _HALF
    return nibbles.astype(np.uint32)


def _int8_words(codes: Bytes) -> NDArray[np.uint32]:
    """[rows, columns / 4]: columns 0 2 in the lower half of a word, 1 3 in the upper."""
    four = np.ascontiguousarray(codes).view("<u4")
    words: NDArray[np.uint32] = four & np.uint32(0xFF0000FF)
    words |= four >> np.uint32(8) & np.uint32(0xFF00)
    words |= (four & np.uint32(0xFF00)) << np.uint32(8)
    return words


def _tiled(values: NDArray[Any]) -> NDArray[Any]:
    """[rows, n] -> [tiles, n, 16]."""
    missing = -len(values) % ROWS_PER_TILE
    if missing:
        values = np.concatenate([values, np.zeros((missing, values.shape[1]), dtype=values.dtype)])
    tiles = values.reshape(-1, ROWS_PER_TILE, values.shape[1])
    return np.ascontiguousarray(tiles.transpose(0, 2, 1))


def _halves(values: NDArray[np.float32]) -> NDArray[np.float16]:
    return values.astype(np.float16) + np.float16(0)  # no minus zero
