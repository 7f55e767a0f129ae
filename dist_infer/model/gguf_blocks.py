"""Blocks of GGUF as numbers: dequantised to floats, or as the codes and scales of one of our encodings, unchanged.

Legend: n blocks of `block` elements and `size` bytes each; arrays are uint8 [n, size] coming in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_GROUP = 32
_LARGEST_F16 = 65504.0
_SMALLEST_F16 = 2.0**-24
# 16 rows at a time is how the gguf package works; this many elements in each keep its temporaries in the cache
_ROW_ELEMENTS = 4096


@dataclass(frozen=True, kw_only=True)
class Codes:
    """codes [n, block] uint8 (int8: q + 128), scales and minima [n, block / 32]; minima None: there are none."""

    codes: Bytes
    scales: Floats
    minima: Floats | None = None


def floats_of(kind: str, blocks: Bytes) -> torch.Tensor:
    """[n, block] float32 of blocks of any type that can be read. Raises KeyError or NotImplementedError for others."""
    if kind in _FLOATS:
        return torch.from_numpy(np.ascontiguousarray(blocks)).view(_FLOATS[kind]).float()
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    n, size = blocks.shape
    wide = math.gcd(n, max(1, _ROW_ELEMENTS // _block(kind)))
    rows = np.ascontiguousarray(blocks).reshape(n // wide, wide * size)
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is found, and named, by whoever encodes
        values = dequantize(rows, GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values).reshape(n, -1))


def can_dequantise(kind: str) -> bool:
    """Whether the installed gguf package knows the type."""
    if kind in _FLOATS:
        return True
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        known = GGMLQuantizationType[kind]
        dequantize(np.zeros((1, GGML_QUANT_SIZES[known][1]), dtype=np.uint8), known)
    except (KeyError, NotImplementedError):
        return False
    return True


def codes_of(kind: str, encoding: str, blocks: Bytes) -> Codes | None:
    """The blocks' own codes and scales in `encoding`; None where they have none there, or float16 cannot hold them.

    scale · q + minimum is then the block's own number, but for scales that are products (Q4_K, IQ4_XS): those are
    rounded to float16.
    """
    unpack = _UNPACK.get((kind, encoding))
    if unpack is None:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        found = unpack(blocks)
        for part in (found.scales,) if found.minima is None else (found.scales, found.minima):
            if not (np.abs(part) <= _LARGEST_F16).all():
                return None
    return found


def _block(kind: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return int(GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0])


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block: [n, 1] float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[n, groups · 16] -> [n, groups · 32]: of every 16 bytes first all low halves, then all high ones."""
    n, width = packed.shape
    groups = packed.reshape(n, width // 16, 16)
    codes = np.empty((n, width // 16, 2, 16), dtype=np.uint8)
    np.bitwise_and(groups, 15, out=codes[:, :, 0])
    np.right_shift(groups, 4, out=codes[:, :, 1])
    return codes.reshape(n, 2 * width)


def _half_precise(values: NDArray[Any]) -> Floats:
    return values.astype(np.float16).astype(np.float32)


def _q4_0(blocks: Bytes) -> Codes:
    scales = _half(blocks, 0)
    return Codes(codes=_nibbles(blocks[:, 2:]), scales=scales, minima=-8 * scales)


def _q4_1(blocks: Bytes) -> Codes:
    return Codes(codes=_nibbles(blocks[:, 4:]), scales=_half(blocks, 0), minima=_half(blocks, 2))


def _q4_k(blocks: Bytes) -> Codes:
    from gguf.quants import Q4_K

    n = len(blocks)
    scales, minima = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    packed = blocks[:, 16:].reshape(n, 4, 32)
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(n, 256)
    scales, minima = _half(blocks, 0) * scales.astype(np.float32), _half(blocks, 2) * minima.astype(np.float32)
    return Codes(codes=codes, scales=_half_precise(scales), minima=_half_precise(-minima))


def _ternary(kind: str, at: int) -> Callable[[Bytes], Codes]:
    """-1, 0, 1 (or 2) times one scale, the float16 at byte `at`, for all of a block."""

    def unpack(blocks: Bytes) -> Codes:
        scales = np.repeat(_half(blocks, at), 256 // _GROUP, axis=1)
        unscaled = blocks.copy()
        unscaled[:, at : at + 2] = np.array([1], dtype=np.float16).view(np.uint8)
        codes = (floats_of(kind, unscaled) + 1).to(torch.uint8).numpy()
        return Codes(codes=codes, scales=scales, minima=-scales)

    return unpack


def _q5_0(blocks: Bytes) -> Codes:
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << np.uint8(4)
    return Codes(codes=(_nibbles(blocks[:, 6:]) | fifth) + np.uint8(128 - 16), scales=_half(blocks, 0))


def _q8_0(blocks: Bytes) -> Codes:
    return Codes(codes=blocks[:, 2:] ^ np.uint8(128), scales=_half(blocks, 0))


def _q4_0_in_bytes(blocks: Bytes) -> Codes:
    return Codes(codes=_nibbles(blocks[:, 2:]) + np.uint8(128 - 8), scales=_half(blocks, 0))


def _iq4_nl(blocks: Bytes) -> Codes:
    from gguf.quants import IQ4_NL

    return Codes(codes=_looked_up(IQ4_NL.kvalues, blocks[:, 2:]), scales=_half(blocks, 0))


def _iq4_xs(blocks: Bytes) -> Codes:
    from gguf.quants import IQ4_NL

    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(len(blocks), 8)
    steps = (low | (high.astype(np.uint8) & 3) << 4).astype(np.float32) - 32
    return Codes(codes=_looked_up(IQ4_NL.kvalues, blocks[:, 8:]), scales=_half_precise(_half(blocks, 0) * steps))


def _mxfp4(blocks: Bytes) -> Codes:
    from gguf.quants import MXFP4

    scales = np.ascontiguousarray(MXFP4.e8m0_to_fp32_half(blocks[:, :1]), dtype=np.float32)
    # powers of two: exact down to float16's least; what is below stands for weights under a millionth
    return Codes(codes=_looked_up(MXFP4.kvalues, blocks[:, 1:]), scales=np.where(scales < _SMALLEST_F16, 0, scales))


def _looked_up(values: tuple[int, ...], packed: Bytes) -> Bytes:
    return (np.array(values, dtype=np.int16) + 128).astype(np.uint8)[_nibbles(packed)]


_UNPACK: dict[tuple[str, str], Callable[[Bytes], Codes]] = {
    ("Q4_0", "int4-g32"): _q4_0,
    ("Q4_1", "int4-g32"): _q4_1,
    ("Q4_K", "int4-g32"): _q4_k,
    ("TQ1_0", "int4-g32"): _ternary("TQ1_0", 52),
    ("TQ2_0", "int4-g32"): _ternary("TQ2_0", 64),
    ("Q4_0", "int8-g32"): _q4_0_in_bytes,
    ("Q5_0", "int8-g32"): _q5_0,
    ("Q8_0", "int8-g32"): _q8_0,
    ("IQ4_NL", "int8-g32"): _iq4_nl,
    ("IQ4_XS", "int8-g32"): _iq4_xs,
    ("MXFP4", "int8-g32"): _mxfp4,
}
