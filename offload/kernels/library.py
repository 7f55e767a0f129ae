"""The compiled kernels as Python functions on tensors. ctypes lets go of the GIL while one runs.

All tensors are contiguous and on the CPU; callers see to that. Memory: what each function says, nothing is kept.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload.kernels.build import CACHE, BuildError, build
from partition.encoding import LEAST_GROUP, group_of

if TYPE_CHECKING:
    from offload.encoded import EncodedTensor

FEW_ROWS = 8  # of x, at most, for few_rows: MOST_ROWS of gemv.c
_KINDS = {"int4": 0, "int8": 1, "fp8": 2}
_SWITCH = "DIST_INFER_KERNELS"


class _Matrix(ctypes.Structure):
    """Matrix of tiles.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("half_scales", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class Library:
    """One compiled library. Any thread may call it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be loaded."""
        self.path = path
        self._c = ctypes.CDLL(str(path))
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        matrix = ctypes.POINTER(_Matrix)
        for name, result, arguments in (
            ("decode_bfloat16", None, (matrix, pointer, number)),
            ("decode_float32", None, (matrix, pointer, number)),
            ("few_rows", None, (matrix, pointer, number, pointer, pointer, pointer, number)),
            ("many_rows", None, (matrix, pointer, count, pointer, pointer, pointer, number)),
            ("matmul_scratch", count, (matrix, count, number)),
            ("matmul_ready", number, ()),
            ("int4_search", None, (pointer, count, count, count, pointer, pointer, number)),
            (
                "encode_bytes",
                None,
                (pointer, count, count, count, number, ctypes.c_float, number, pointer, pointer, number),
            ),
        ):
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        self.has_matmul = bool(self._c.matmul_ready())

    def decode(self, encoded: EncodedTensor, dtype: torch.dtype) -> Tensor:
        """A new tensor of the encoded one's shape, bfloat16 or float32."""
        out = torch.empty(encoded.shape, dtype=dtype)
        function = self._c.decode_bfloat16 if dtype == torch.bfloat16 else self._c.decode_float32
        function(_matrix(encoded), out.data_ptr(), torch.get_num_threads())
        return out

    def few_rows(self, x: Tensor, encoded: EncodedTensor, bias: Tensor | None, out: Tensor) -> None:
        """bfloat16 x [M, K], M at most FEW_ROWS, by a matrix [N, K] into out [M, N]. Beside it, x in float32."""
        scratch = torch.empty(len(x), x.shape[1] + x.shape[1] // LEAST_GROUP, dtype=torch.float32)
        where = bias.data_ptr() if bias is not None else None
        threads = torch.get_num_threads()
        self._c.few_rows(_matrix(encoded), x.data_ptr(), len(x), where, out.data_ptr(), scratch.data_ptr(), threads)

    def many_rows(self, x: Tensor, encoded: EncodedTensor, bias: Tensor | None, out: Tensor) -> None:
        """The same for any M, where `has_matmul`. Beside it, x again and at most about 1 MiB a thread."""
        matrix, threads = _matrix(encoded), torch.get_num_threads()
        scratch = torch.empty(self._c.matmul_scratch(matrix, len(x), threads), dtype=torch.uint8)
        where = bias.data_ptr() if bias is not None else None
        self._c.many_rows(matrix, x.data_ptr(), len(x), where, out.data_ptr(), scratch.data_ptr(), threads)

    def int4_search(self, chunk: Tensor, group: int, codes: Tensor, scales: Tensor) -> None:
        """What kernels.int4_search.search does, the same bytes."""
        rows, columns = chunk.shape
        threads = torch.get_num_threads()
        self._c.int4_search(chunk.data_ptr(), rows, columns, group, codes.data_ptr(), scales.data_ptr(), threads)

    def encode_bytes(self, chunk: Tensor, encoding: str, most: float, codes: Tensor, scales: Tensor) -> None:
        """float32 [n, K] into the codes and scales of int8 or fp8, scale = max|w| / most."""
        rows, columns = chunk.shape
        self._c.encode_bytes(
            chunk.data_ptr(),
            rows,
            columns,
            group_of(encoding, columns),
            _KINDS[encoding.partition("-")[0]],
            most,
            scales.dtype == torch.float16,
            codes.data_ptr(),
            scales.data_ptr(),
            torch.get_num_threads(),
        )


def _matrix(encoded: EncodedTensor) -> _Matrix:
    """The C view of an encoded tensor, its leading axes flattened; made once, and kept by the tensor."""
    known: _Matrix | None = encoded.__dict__.get("_matrix")
    if known is None:
        known = encoded.__dict__["_matrix"] = _new_matrix(encoded)
    return known


def _new_matrix(encoded: EncodedTensor) -> _Matrix:
    return _Matrix(
        kind=_KINDS[encoded.encoding.partition("-")[0]],
        half_scales=encoded.scales.dtype == torch.float16,
        rows=encoded.shape[:-1].numel(),
        columns=encoded.shape[-1],
        group=group_of(encoded.encoding, encoded.shape[-1]),
        codes=encoded.codes.data_ptr(),
        scales=encoded.scales.data_ptr(),
    )


class _Loaded:
    """What this process computes with, found out at the first use: a library, or the reason why there is none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = False
        self._library: Library | None = None
        self._reason = ""

    def get(self) -> tuple[Library | None, str]:
        """The library, or None and the reason."""
        if self._known:
            return self._library, self._reason
        with self._lock:
            if not self._known:
                try:
                    self._library = load(CACHE)
                except BuildError as error:
                    self._reason = str(error)
                self._known = True
        return self._library, self._reason


def load(cache: Path, flags: Sequence[str] = ()) -> Library:
    """The library from the cache, or built into it. A damaged file is built again, once. Raises BuildError."""
    if os.environ.get(_SWITCH) == "off":
        raise BuildError(f"{_SWITCH}=off")
    path = build(cache, flags)
    try:
        return Library(path)
    except OSError:
        path.unlink(missing_ok=True)
    try:
        return Library(build(cache, flags))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}") from error


loaded = _Loaded()
