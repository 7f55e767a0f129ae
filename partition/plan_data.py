"""The plan as frozen data: which rank owns which bytes, in which tier, and what that should cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from partition.encoding import EncodingChoice
from partition.model_spec import ModelSpec

Tier = Literal["device", "host", "nvme", "rows"]
# logits as float and edited 8, sorted with their ids 12, float64 distribution 8, for typical_p distances and their sort
# 32, a mask or two, scratch of a sort on a GPU 16
SAMPLING_BYTES_PER_LOGIT = 80
SAMPLING_BYTES = 20 << 20  # rows are drawn in slices of this size, so that sampling stays within the plan
HEAD_ROWS = 16  # rows of logits that the head computes at once, at least, for log-probabilities of prompts
ATTENTION_SCORES = 1 << 20  # query rows × keys that one attention call computes; long prompts go in slices of rows
LATENT_ELEMENTS = 1 << 24  # of what latent attention expands or absorbs at a time; it works in slices of this size
ATTENTION_BYTES_PER_SCORE = 16  # masks as bool and as float; with a softcap or sinks scores, edited, and their softmax
ROW_STAGING_BYTES = 8 << 20  # pages that hold the rows of an embedding on disk; long prompts take several rounds
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DEFAULT_MAX_MODEL_LEN = 8192


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a user may say about a plan; None means: choose. Sizes are bytes.

    `host_memory`: per node, shared by its ranks; on cpu the ceiling for weights, slots, KV and activations together.
    `device_memory` and `kv_memory`: per rank. `max_batch_tokens`: tokens of one micro-batch.
    `process_footprint_bytes`: what a worker process takes before any weight; `launcher_footprint_bytes`: what else runs
    on node 0. `encodings`: how weights are kept at rest. `embedding_rows`: on cpu the embedding may stay on disk, where
    a pass reads the rows of its tokens, if that makes room for what is streamed.
    """

    name: str
    tensor: int = 1
    pipeline: int = 1
    dtype: str = "bfloat16"
    encodings: EncodingChoice = field(default_factory=EncodingChoice)
    embedding_rows: bool = False
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

    def longest_sequence(self, spec: ModelSpec) -> int:
        """Tokens that a sequence may have if memory allows it."""
        return self.max_model_len or min(spec.max_position, DEFAULT_MAX_MODEL_LEN)


@dataclass(frozen=True, kw_only=True)
class UnitPlacement:
    """One unit of one rank: its packed blob's length and the tier that it lives in.

    On cpu a unit in "nvme" may keep its first arrays in memory: bytes [0, kept_bytes) stay, [streamed_from, num_bytes)
    are read in every pass. Both are multiples of 4096 with at most a page in common; every array is whole in one part.
    In "rows" (the embedding) only the rows of a pass's tokens are read, which no figure here counts.
    """

    name: str
    tier: Tier
    num_bytes: int
    kept_bytes: int = 0
    streamed_from: int = 0

    @property
    def disk_bytes(self) -> int:
        """Read from disk in every pass, and so what a slot must hold."""
        return self.num_bytes - self.streamed_from if self.tier == "nvme" else 0


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """What one rank owns and may allocate. Layers are half-open; units are in order of use.

    On cpu a unit computes where it lies, `slot_bytes` is the largest part that is streamed, and `num_device_slots` is
    0. On cuda `slot_bytes` is the size of the device slots as well as of the pinned host slots (`num_slots` of them).
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
        """Weights in this tier. Of a unit that is cut, the kept part counts as host, the streamed part as nvme."""
        if tier == "nvme":
            return sum(unit.disk_bytes for unit in self.units)
        kept = sum(unit.kept_bytes for unit in self.units) if tier == "host" else 0
        return kept + sum(unit.num_bytes for unit in self.units if unit.tier == tier)

    @property
    def on_cuda(self) -> bool:
        return self.num_device_slots > 0 or any(unit.tier == "device" for unit in self.units)

    @property
    def resident_bytes(self) -> int:
        """Weights that are where they are computed, and so never move."""
        return self.bytes_in("device" if self.on_cuda else "host")

    @property
    def streamed_bytes_per_pass(self) -> int:
        """Weights that move once a pass, from disk or on cuda from host memory."""
        if self.on_cuda:
            return sum(unit.num_bytes for unit in self.units) - self.resident_bytes
        return self.bytes_in("nvme")

    @property
    def host_bytes(self) -> int:
        """Of this rank's node: weights, slots, and on cpu also KV and activations."""
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
class KvChoice:
    """One way to share memory between KV and weights, and what it should decode. Bytes are those of all ranks.

    `batch`: requests of the expected length that the blocks hold, at most max_requests.
    """

    num_blocks: int
    batch: int
    kv_bytes: int
    resident_bytes: int
    tokens_per_s: float
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The frozen answer of the planner. `ranks[r].rank == r`.

    `encoding`: the at-rest encoding by name. `kv_choices`: what was weighed, fewest blocks first, one of them chosen.
    `ring_rows[i]`: rows that layer i keeps of each of max_requests requests, 0 where it keeps blocks;
    empty where all do.
    """

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
    encoding: str = "float"
    kv_choices: tuple[KvChoice, ...] = ()
    ring_rows: tuple[int, ...] = ()

    @property
    def num_kv_blocks(self) -> int:
        """The same on every rank."""
        return self.ranks[0].num_kv_blocks

    def stage_ranks(self, stage: int) -> tuple[RankPlan, ...]:
        """The tensor-parallel ranks of a stage, in order."""
        return self.ranks[stage * self.tensor : (stage + 1) * self.tensor]
