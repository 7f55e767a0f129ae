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
_E4M3_NAN = 0x7F


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


def from_codes(
    encoding: str,
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype,
    codes: Tensor,
    scales: Tensor,
    minima: Tensor | None = None,
) -> EncodedTensor:
    """What another format already holds as codes and scales, without a change of value.

    codes   uint8 [.., N, K]: int4 0..15; int8 q + 128; fp8 the byte
    scales  float32 [.., N, K/g], and minima likewise (int4 needs them, the others have none). Where the encoding keeps
            float16 they are rounded to it: exact for those that came from float16. Below 2**-100 is 0.

    Raises ValueError for shapes that do not fit, codes out of range, and scales that are not finite or too large.
    """
    kind = encoding.partition("-")[0]
    columns = shape[-1]
    groups = columns // group_of(encoding, columns)
    encoded = _empty(encoding, torch.Size(shape), dtype, codes.device)
    if codes.dtype != torch.uint8 or tuple(codes.shape) != tuple(shape):
        raise ValueError(f"codes of {encoding} must be uint8 {tuple(shape)}, not {codes.dtype} {tuple(codes.shape)}")
    if (minima is not None) != (kind == "int4"):
        raise ValueError(f"{encoding} {'needs' if kind == 'int4' else 'has no'} minima")
    if kind == "int4" and codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"a code of {encoding} is {int(codes.max())}: 0 to 15 are possible")
    if kind == "fp8" and bool(((codes & 0x7F) == _E4M3_NAN).any()):
        raise ValueError(f"a code of {encoding} is NaN")
    rounded = [_rounded_scales(encoding, "scales", scales, (*shape[:-1], groups))]
    if minima is not None:
        rounded.append(_rounded_scales(encoding, "minima", minima, (*shape[:-1], groups)))
    encoded.codes.copy_(pack_codes(encoding, codes.reshape(-1, columns)))
    _write_scales(encoded.scales, *rounded)
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


def _rounded_scales(encoding: str, name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Given scales or minima, checked, as float32 that the encoding holds exactly."""
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} of {encoding} must have the shape {shape}, not {tuple(values.shape)}")
    values = values.float()
    if encoding.startswith("int4") or encoding == "int8-g32":
        values = values.half().float()
    if values.numel() and not values.abs().max().item() <= _LARGEST:
        raise ValueError(f"{name} of {encoding} are not finite, or too large")
    return torch.where(values.abs() < _LEAST_SCALE, 0.0, values)
