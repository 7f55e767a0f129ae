"""A weight matrix in an at-rest encoding, usable where torch expects the weight of a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload import kernels
from offload.dtypes import dtype_named
from partition.encoding import ROWS_PER_TILE, parts_of

# not whatever a tensor has: a look at `.grad` must not decode a matrix
_OF_THE_DECODED = ("T", "mT", "t", "transpose", "view", "reshape", "squeeze", "unsqueeze", "to", "float")


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedTensor:
    """A tensor [.., N, K] as codes and scales of partition.encoding. It owns no memory: both may be views of a slot.

    It may stand in a module's `_parameters`: `F.linear(x, encoded, bias)` computes from the codes, every other torch
    function gets the decoded tensor. `dtype` is what it computes in. No gradients.
    """

    encoding: str
    shape: torch.Size
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        """Raises ValueError where codes and scales are not what the encoding says; the kernels rely on it."""
        for part, tensor in zip(parts_of(self.encoding, tuple(self.shape)), (self.codes, self.scales), strict=True):
            if tensor.dtype != dtype_named(part.dtype) or tuple(tensor.shape) != part.shape:
                raise ValueError(
                    f"{part.name} of {self.encoding} {tuple(self.shape)} must be {part.dtype} {part.shape}, "
                    f"not {tensor.dtype} {tuple(tensor.shape)}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{part.name} of {self.encoding} {tuple(self.shape)} must be contiguous")

    @property
    def ndim(self) -> int:
        """The number of axes of the tensor it stands for."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Where codes and scales lie."""
        return self.codes.device

    @property
    def requires_grad(self) -> bool:
        """Never: codes cannot be trained."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes at rest."""
        return self.codes.nbytes + self.scales.nbytes

    def dim(self) -> int:
        """The number of axes of the tensor it stands for."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> torch.Size | int:
        """The shape, or one axis of it."""
        return self.shape if axis is None else self.shape[axis]

    def numel(self) -> int:
        """Elements of the tensor it stands for."""
        return self.shape.numel()

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor of `shape`: scale * q + minimum in float32, rounded once more to `dtype` (None: its own)."""
        return kernels.decode(self, dtype or self.dtype)

    def __getitem__(self, index: Any) -> EncodedTensor | Tensor:
        """Of packed experts [E, N, K] and one index (an int or a tensor without axes): that expert's matrix, a view.

        Anything else indexes the decoded tensor. Raises IndexError.
        """
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        if self.ndim != 3 or not single:
            return self.decode()[index]
        experts, rows, _ = self.shape
        expert = int(index)
        if not -experts <= expert < experts:
            raise IndexError(f"expert {expert} of {experts}")
        if rows % ROWS_PER_TILE:  # this expert's rows begin inside a tile
            return self.decode()[expert]
        tiles = rows // ROWS_PER_TILE
        first = expert % experts * tiles
        return EncodedTensor(
            encoding=self.encoding,
            shape=self.shape[1:],
            dtype=self.dtype,
            codes=self.codes[first : first + tiles],
            scales=self.scales[first : first + tiles],
        )

    def __getattr__(self, name: str) -> Any:
        """What model code asks of a weight beside its facts is asked of the decoded one."""
        if name not in _OF_THE_DECODED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.decode(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Torch's protocol: linear from the codes where the weight, and only the weight, is encoded; else decoded."""
        named = dict(kwargs or {})
        if func is torch.nn.functional.linear:
            x, weight, bias = (
                args[at] if at < len(args) else named.get(name) for at, name in enumerate(("input", "weight", "bias"))
            )
            if isinstance(weight, EncodedTensor) and isinstance(x, Tensor) and not isinstance(bias, EncodedTensor):
                return kernels.linear(x, weight, bias)
        return func(*(_decoded(value) for value in args), **{name: _decoded(value) for name, value in named.items()})


def _decoded(value: Any) -> Any:
    """An argument of a torch function with every encoded tensor in it decoded."""
    if isinstance(value, EncodedTensor):
        return value.decode()
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_decoded(item) for item in value)
    return value
