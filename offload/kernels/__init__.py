"""Linear layers that compute from at-rest encodings: C kernels where they can be built, torch operations elsewhere.

Which kernel runs depends on the number of rows of x alone, by constants from benchmarks/kernels.py: nothing is timed at
run time, so that a run gives the same bits again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from offload.kernels.layout import decode_tiles
from offload.kernels.library import FEW_ROWS, loaded

if TYPE_CHECKING:
    from offload.encoded import EncodedTensor

# up to so many rows of x, computing from the codes of each is faster than decoding tiles for AMX
_FEW_BESIDE_MATMUL = {"int4": 4, "int8": 6, "fp8": 7}
_MOST_ROWS_AT_ONCE = 512  # of x, so that the scratch is bounded


def prepare() -> None:
    """Find or compile the kernels now, not within the first computation. Where there are none nothing happens."""
    loaded.get()


def status() -> str:
    """One line for people: which kernels this process computes with, or why none."""
    library, reason = loaded.get()
    if library is None:
        return f"torch operations ({reason})"
    return f"C kernels{' with AMX' if library.has_matmul else ''} ({library.path})"


def decode(encoded: EncodedTensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of the encoded one's shape: float32 arithmetic, rounded to `dtype` at the end."""
    library, _ = loaded.get()
    if library is not None and encoded.device.type == "cpu":
        if dtype in (torch.bfloat16, torch.float32):
            return library.decode(encoded, dtype)
        return library.decode(encoded, torch.float32).to(dtype)
    values = decode_tiles(encoded.encoding, encoded.shape[-1], encoded.codes, encoded.scales)
    return values[: encoded.shape[:-1].numel()].to(dtype).reshape(encoded.shape)


def linear(x: Tensor, encoded: EncodedTensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, encoded, bias)`: x [.., K], a matrix [N, K], bias [N]. Sums are float32.

    Memory beside the result: at most 512 rows of x twice and 1 MiB a thread, or the decoded matrix where no kernel fits
    (no compiler, another type than bfloat16, another device, many rows without AMX).
    """
    library, _ = loaded.get()
    if library is None or not _fits(x, encoded, bias):
        return functional.linear(x, decode(encoded, encoded.dtype), bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    few = _FEW_BESIDE_MATMUL[encoded.encoding.partition("-")[0]] if library.has_matmul else FEW_ROWS
    if len(rows) <= few:
        out = rows.new_empty(len(rows), encoded.shape[0])
        library.few_rows(rows, encoded, bias, out)
    elif library.has_matmul:
        out = rows.new_empty(len(rows), encoded.shape[0])
        for first in range(0, len(rows), _MOST_ROWS_AT_ONCE):
            piece = slice(first, first + _MOST_ROWS_AT_ONCE)
            library.many_rows(rows[piece], encoded, bias, out[piece])
    else:
        out = functional.linear(rows, decode(encoded, torch.bfloat16), bias)
    return out.view(*x.shape[:-1], encoded.shape[0])


def _fits(x: Tensor, encoded: EncodedTensor, bias: Tensor | None) -> bool:
    """Whether the kernels compute this product: all bfloat16 on the CPU, shapes as they should be, no gradient."""
    tensors = [x] if bias is None else [x, bias]
    return (
        encoded.dtype == torch.bfloat16
        and encoded.device.type == "cpu"
        and encoded.ndim == 2
        and encoded.shape[0] > 0
        and x.ndim > 0
        and x.shape[-1] == encoded.shape[-1]
        and x.numel() > 0
        and all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
        and (bias is None or (tuple(bias.shape) == (encoded.shape[0],) and bias.is_contiguous()))
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )
