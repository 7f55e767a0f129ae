"""Floats to at-rest encodings. Deterministic: the same bytes at any number of threads, with C kernels or without.

    int8       q = round(w / scale), scale = max|w| / 127 of a row, or of 32 columns and then rounded to float16
    int4       scale and minimum with the least squared error among several shrunken ranges, see kernels.int4_search
    fp8        q = e4m3(w / scale), scale = max|w| / 448

Memory beside tensor and result: a few float32 copies of at most 2**20 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.dtypes import dtype_named
from offload.encoded import EncodedTensor
from offload.kernels import int4_search
from offload.kernels.layout import pack_codes, pack_scales
from offload.kernels.library import loaded
from partition.encoding import ROWS_PER_TILE, group_of, parts_of

_CHUNK_ELEMENTS = 1 << 20
_LEAST_SCALE = 2.0**-100  # smaller ones count as 0: products with them would be denormal, which vector units flush
_LARGEST = 2.0**120
_MOST = {"int8": 127.0, "fp8": 448.0}  # the largest codes
_HALF_LARGEST = 65504.0


def encode(tensor: Tensor, encoding: str, dtype: torch.dtype) -> EncodedTensor:
    """A float tensor [.., N, K] in an encoding other than raw; `dtype` is what the result computes in.

    Raises ValueError for inf, NaN, values that the encoding's scales cannot hold, and shapes it cannot hold.
    """
    rows = tensor.shape[:-1].numel()
    columns = tensor.shape[-1]
    encoded = _empty(encoding, tensor.shape, dtype, tensor.device)
    matrix = tensor.detach().reshape(rows, columns)
    step = max(1, _CHUNK_ELEMENTS // columns // ROWS_PER_TILE) * ROWS_PER_TILE
    for first in range(0, rows, step):
        chunk = matrix[first : first + step].float()
        largest = chunk.abs().max().item() if chunk.numel() else 0.0
        if not largest < float("inf"):  # NaN is neither
            bad = (~chunk.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{chunk[bad[0], bad[1]].item()} at row {first + bad[0]}, column {bad[1]}")
        tiles = slice(first // ROWS_PER_TILE, -(-(first + chunk.shape[0]) // ROWS_PER_TILE))
        _encode_chunk(chunk.contiguous(), encoding, largest, encoded.codes[tiles], encoded.scales[tiles])
    return encoded


def _empty(encoding: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> EncodedTensor:
    """An encoded tensor whose bytes are not written yet."""
    codes, scales = (
        torch.empty(part.shape, dtype=dtype_named(part.dtype), device=device)
        for part in parts_of(encoding, tuple(shape))
    )
    return EncodedTensor(encoding=encoding, shape=shape, dtype=dtype, codes=codes, scales=scales)


def _encode_chunk(chunk: Tensor, encoding: str, largest: float, codes: Tensor, scales: Tensor) -> None:
    """Whole tiles of rows, float32 [n, K] with |w| <= largest, into their codes and scales."""
    kind = encoding.partition("-")[0]
    group = group_of(encoding, chunk.shape[-1])
    library = loaded.get()[0] if chunk.device.type == "cpu" else None
    if kind == "int4":
        if largest > _HALF_LARGEST:
            raise ValueError(f"{largest:.6g} is too large for {encoding}: its float16 minimum ends at 65504")
        if library is not None:
            library.int4_search(chunk, group, codes, scales)
        else:
            int4_search.search(chunk, group, codes, scales)
        return
    if largest > _LARGEST:
        raise ValueError(f"{largest:.6g} is too large for {encoding}")
    most = _MOST[kind]
    if scales.dtype == torch.float16 and torch.tensor(largest / most).half().isinf():
        raise ValueError(f"{largest:.6g} is too large for {encoding}: its float16 scale ends at 65504")
    if library is not None:
        library.encode_bytes(chunk, encoding, most, codes, scales)
    else:
        _encode_bytes(chunk.view(len(chunk), -1, group), encoding, most, codes, scales)


def _encode_bytes(grouped: Tensor, encoding: str, most: float, codes: Tensor, scales: Tensor) -> None:
    """The same for int8 and fp8 by torch operations: float32 [n, K/g, g]."""
    scale = grouped.abs().amax(-1) / most
    scale = torch.where(scale < _LEAST_SCALE, 0.0, scale).to(scales.dtype).float()
    divisor = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    values = torch.where(scale.unsqueeze(-1) == 0, 0.0, grouped / divisor).clamp_(-most, most)
    if encoding.startswith("int8"):
        packed = values.round_().add_(128).to(torch.uint8)
    else:
        packed = values.to(torch.float8_e4m3fn).view(torch.uint8)
    codes.copy_(pack_codes(encoding, packed.flatten(-2)))
    _write_scales(scales, scale)


def _write_scales(out: Tensor, *parts: Tensor) -> None:
    """[.., N, K/g] each, into the scales of tiles."""
    tiles = [pack_scales(part.reshape(-1, part.shape[-1]).to(out.dtype)) for part in parts]
    out.copy_(tiles[0] if len(tiles) == 1 else torch.stack(tiles, 2))
