"""The element types of a manifest as torch types."""

from __future__ import annotations

import torch

from offload.format import DTYPE_BYTES

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}


def dtype_named(name: str) -> torch.dtype:
    """The torch type of a manifest's name, which format has checked. Raises KeyError for another one."""
    return _DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """The manifest's name of a torch type. Raises ValueError for a type that a store cannot hold."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"a store cannot hold {dtype}: {', '.join(_DTYPES)}")
    return name
