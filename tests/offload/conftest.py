"""Small stores of random bytes, and children that can be killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.format import Manifest, StoreKey, read_manifest
from offload.pack import PackProgress, PackReport, pack_store

Shards = Sequence[Mapping[str, torch.Tensor]]


class TensorSource:
    """A WeightSource over tensors in memory; `loads` lists the units asked for."""

    def __init__(self, units: Mapping[str, Shards]) -> None:
        self.units = units
        self.loads: list[str] = []

    def load_unit(self, unit: str) -> Shards:
        self.loads.append(unit)
        return self.units[unit]


def random_tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random bits, NaN with payload and denormals included."""
    numel = 1
    for size in shape:
        numel *= size
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(tuple(shape))


def random_units(num_units: int, num_ranks: int = 1, seed: int = 0) -> dict[str, Shards]:
    """Units of different lengths, several tensors each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{index}": [
            {
                "norm.weight": random_tensor((5,), torch.float32, generator),
                "mlp.weight": random_tensor((37, 3 + 40 * (index % 3)), torch.bfloat16, generator),
            }
            for _ in range(num_ranks)
        ]
        for index in range(num_units)
    }


def quiet(_: PackProgress) -> None:
    """No progress wanted."""


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal type, shape and bits; NaN equals itself here."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )


def in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run `work` in a forked child; (wait status, its JSON result or None). Torch stays loaded, so this takes ms."""
    pid, result = start_child(work)
    return finish_child(pid, result)


def start_child(work: Callable[[], Any]) -> tuple[int, int]:
    """Fork a child that runs `work`; (pid, descriptor of its result)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the parent's pool of threads did not come along
            os.write(writing, json.dumps(work()).encode())
            code = 0
        except BaseException as error:
            os.write(writing, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(code)
    os.close(writing)
    return pid, reading


def finish_child(pid: int, result: int) -> tuple[int, Any]:
    """Wait for a child of `start_child`."""
    data = b""
    while piece := os.read(result, 65536):
        data += piece
    os.close(result)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), json.loads(data) if data else None


class Kit:
    """The helpers above as one fixture, because tests are no package to import from."""

    TensorSource = TensorSource
    random_tensor = staticmethod(random_tensor)
    random_units = staticmethod(random_units)
    same_bits = staticmethod(same_bits)
    in_child = staticmethod(in_child)
    start_child = staticmethod(start_child)
    finish_child = staticmethod(finish_child)
    quiet = staticmethod(quiet)
    key = StoreKey(fingerprint="f" * 16, model_type="llama", dtype="bfloat16", encoding="raw", tensor=1)

    @staticmethod
    def pack(directory: Path, units: Mapping[str, Shards], key: StoreKey = key) -> PackReport:
        """Pack all units for all ranks."""
        num_ranks = len(next(iter(units.values())))
        return pack_store(directory, key, list(units), range(num_ranks), TensorSource(units), quiet)

    @staticmethod
    def packed(directory: Path, units: Mapping[str, Shards]) -> Manifest:
        """Pack, and read the manifest."""
        Kit.pack(directory, units)
        return read_manifest(directory)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
