"""The at-rest layout of partition.encoding in torch operations: the reference for the C kernels, on any device.

Shapes: T tiles of 16 rows, N rows, K columns, g columns that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partition.encoding import ROWS_PER_TILE, group_of


def pack_codes(encoding: str, codes: Tensor) -> Tensor:
    """One code a byte, uint8 [N, K], as codes of tiles, [T, K/8 or K/4, 64]. Missing rows of the last tile are 0."""
    rows, columns = codes.shape
    tiles = -(-rows // ROWS_PER_TILE)
    if rows % ROWS_PER_TILE:
        codes = torch.cat([codes, codes.new_zeros(tiles * ROWS_PER_TILE - rows, columns)])
    steps = 4 if encoding.startswith("int4") else 2
    words = codes.view(tiles, ROWS_PER_TILE, columns // (2 * steps), steps, 2).permute(0, 2, 1, 4, 3)
    if steps == 4:
        words = words[..., 0::2] | (words[..., 1::2] << 4)
    return words.reshape(tiles, columns // (2 * steps), 64)


def unpack_codes(encoding: str, codes: Tensor) -> Tensor:
    """The codes of tiles as one code a byte, uint8 [16 * T, K]."""
    tiles, lines, _ = codes.shape
    words = codes.view(tiles, lines, ROWS_PER_TILE, 2, 2)
    if encoding.startswith("int4"):
        words = torch.stack((words & 15, words >> 4), -1).flatten(-2)
    return words.permute(0, 2, 1, 4, 3).reshape(tiles * ROWS_PER_TILE, -1)


def pack_scales(scales: Tensor) -> Tensor:
    """One scale a group, [N, K/g], as [T, K/g, 16]."""
    rows, groups = scales.shape
    tiles = -(-rows // ROWS_PER_TILE)
    if rows % ROWS_PER_TILE:
        scales = torch.cat([scales, scales.new_zeros(tiles * ROWS_PER_TILE - rows, groups)])
    return scales.view(tiles, ROWS_PER_TILE, groups).transpose(1, 2).contiguous()


def unpack_scales(scales: Tensor) -> Tensor:
    """[T, K/g, 16] as [16 * T, K/g]."""
    return scales.transpose(1, 2).reshape(-1, scales.shape[1])


def decode_tiles(encoding: str, columns: int, codes: Tensor, scales: Tensor) -> Tensor:
    """Tiles as float32 [16 * T, K]: scale * q + minimum, each operation rounded once."""
    group = group_of(encoding, columns)
    raw = unpack_codes(encoding, codes).view(-1, columns // group, group)
    if encoding.startswith("int4"):
        scale, minimum = (unpack_scales(scales[:, :, part]).float().unsqueeze(-1) for part in (0, 1))
        values = raw.float().mul_(scale).add_(minimum)
    elif encoding.startswith("fp8"):
        values = raw.view(torch.float8_e4m3fn).float().mul_(unpack_scales(scales).unsqueeze(-1))
    else:
        values = raw.float().sub_(128).mul_(unpack_scales(scales).float().unsqueeze(-1))
    return values.flatten(-2)
