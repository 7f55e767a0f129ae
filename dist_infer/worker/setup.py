"""What a rank is told before it starts: plain data, JSON on the wire."""

from __future__ import annotations

from dataclasses import dataclass


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
    config.json. `threads`: compute threads of this process.
    """

    plan_json: str
    config_json: str
    ranks: tuple[int, ...]
    store: StoreLocation
    device: str
    verify: str
    threads: int
    step_timeout_s: float
