"""What a rank is told before it starts: plain data, JSON on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offload.format import StoreKey


@dataclass(frozen=True, slots=True)
class StoreLocation:
    """The packed store a rank reads, and the key it must have."""

    directory: str
    fingerprint: str
    model_type: str
    dtype: str
    encoding: str
    tensor: int


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """Everything a process needs to become the given ranks of a plan.

    `ranks`: one rank for a Ray actor; all stages of one tp_rank for the local executor. `config_json`: the model's
    config.json. `devices`: torch device of each of the ranks. `reader`: what reads the store.
    `threads`: compute threads of this process.
    `timeline`: record when each unit is read and computed. `epoch`: of the gang; steps of another are refused.
    """

    plan_json: str
    config_json: str
    ranks: tuple[int, ...]
    store: StoreLocation
    devices: tuple[str, ...]
    verify: Literal["first", "always", "never"]
    reader: str
    threads: int
    step_timeout_s: float
    timeline: bool = False
    epoch: int = 0


def store_key(location: StoreLocation) -> StoreKey:
    """The key as offload knows it."""
    return StoreKey(
        fingerprint=location.fingerprint,
        model_type=location.model_type,
        dtype=location.dtype,
        encoding=location.encoding,
        tensor=location.tensor,
    )
