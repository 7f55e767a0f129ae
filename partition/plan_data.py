"""The plan as frozen data: which rank owns which bytes, in which tier, and what that should cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from partition.model_spec import ModelSpec

Tier = Literal["device", "host", "nvme"]
SAMPLING_BYTES_PER_LOGIT = 64  # sort (value, id) and the float64 distribution with its sums
SAMPLING_BYTES = 16 << 20  # rows are drawn in slices of this size, so that sampling stays within the plan
ATTENTION_SCORES = 1 << 20  # query rows × keys of one attention call; long prompts are attended in slices of rows
ATTENTION_BYTES_PER_SCORE = 8  # the mask, as bool and as float
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a user may say about a plan; None means: choose. Sizes are bytes.

    `host_memory`: per node, shared by its ranks; on cpu the ceiling for weights, slots, KV and activations together.
    `device_memory` and `kv_memory`: per rank. `max_batch_tokens`: tokens of one micro-batch.
    `process_footprint_bytes`: what a worker process takes before any weight; `launcher_footprint_bytes`: what else runs
    on node 0.
    """

    name: str
    tensor: int = 1
    pipeline: int = 1
    dtype: str = "bfloat16"
    device: str = "cpu"
    device_memory: int | None = None
    host_memory: int | None = None
    num_slots: int | None = None
    kv_memory: int | None = None
    block_tokens: int = 16
    max_batch_tokens: int | None = None
    max_requests: int | None = None
    max_model_len: int | None = None
    process_footprint_bytes: int = 600 << 20
    launcher_footprint_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class UnitPlacement:
    """One unit of one rank: its packed blob's length and the tier that it lives in."""

    name: str
    tier: Tier
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """What one rank owns and may allocate. Layers are half-open; units are in order of use.

    On cpu a unit computes in its slot or resident buffer, and `num_device_slots` is 0. On cuda `slot_bytes` is the size
    of the device slots as well as of the pinned host slots (`num_slots` of them).
    """

    rank: int
    stage: int
    tp_rank: int
    node: int
    first_layer: int
    end_layer: int
    units: tuple[UnitPlacement, ...]
    num_slots: int
    slot_bytes: int
    num_device_slots: int
    num_kv_heads: int
    num_kv_blocks: int
    kv_bytes: int
    activation_bytes: int
    threads: int

    def bytes_in(self, tier: Tier) -> int:
        """Bytes of the units that live in this tier."""
        return sum(unit.num_bytes for unit in self.units if unit.tier == tier)

    @property
    def on_cuda(self) -> bool:
        return self.num_device_slots > 0 or any(unit.tier == "device" for unit in self.units)

    @property
    def resident_bytes(self) -> int:
        """Units that are where they are computed, and so never move."""
        return self.bytes_in("device" if self.on_cuda else "host")

    @property
    def streamed_bytes_per_pass(self) -> int:
        """Units that move once a pass."""
        return sum(unit.num_bytes for unit in self.units) - self.resident_bytes

    @property
    def host_bytes(self) -> int:
        """Of this rank's node: units, slots, and on cpu also KV and activations."""
        own = self.bytes_in("host") + self.num_slots * self.slot_bytes
        return own if self.on_cuda else own + self.kv_bytes + self.activation_bytes

    @property
    def device_bytes(self) -> int:
        """Of this rank's accelerator; 0 on cpu."""
        if not self.on_cuda:
            return 0
        slots = self.num_device_slots * self.slot_bytes
        return self.bytes_in("device") + slots + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True)
class NodeBudget:
    """Host memory of a node that runs ranks: `used_bytes` ≤ `limit_bytes`, the footprint of its processes apart."""

    node: int
    name: str
    limit_bytes: int
    source: str
    footprint_bytes: int
    used_bytes: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a decode step should cost. `seconds_per_pass`: one step through all stages.

    `crossing_tokens`: tokens of a pass at which computing takes as long as streaming (0: nothing is streamed).
    `assumed`: the figures behind it that nobody measured.
    """

    seconds_per_pass: float
    decode_tokens_per_s: float
    bound_by: str
    crossing_tokens: int
    tokens_per_pass: int
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The frozen answer of the planner. `ranks[r].rank == r`."""

    name: str
    model: ModelSpec
    tensor: int
    pipeline: int
    dtype: str
    device: str
    ranks: tuple[RankPlan, ...]
    block_tokens: int
    max_batch_tokens: int
    max_micro_batches: int
    max_requests: int
    max_model_len: int
    max_steps_in_flight: int
    budgets: tuple[NodeBudget, ...]
    prediction: Prediction

    @property
    def num_kv_blocks(self) -> int:
        """The same on every rank."""
        return self.ranks[0].num_kv_blocks

    def stage_ranks(self, stage: int) -> tuple[RankPlan, ...]:
        """The tensor-parallel ranks of a stage, in order."""
        return self.ranks[stage * self.tensor : (stage + 1) * self.tensor]
