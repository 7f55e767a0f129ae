"""Memory to ranks: KV blocks first, then tiers for the weights in what is left, then one RankPlan a rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from partition.errors import BudgetError, ConfigError
from partition.hardware import HardwareFacts
from partition.kv_budget import DEFAULT_MAX_MODEL_LEN, KvDecision, Pool, decide_kv
from partition.layout import blob_layout
from partition.model_spec import ModelSpec
from partition.placement import HostLimit, host_limits, place_stages
from partition.plan_data import (
    ATTENTION_BYTES_PER_SCORE,
    ATTENTION_SCORES,
    DTYPE_BYTES,
    SAMPLING_BYTES,
    SAMPLING_BYTES_PER_LOGIT,
    PlanOptions,
    RankPlan,
    Tier,
    UnitPlacement,
)
from partition.sharding import AxisCut, UnitSpec, cut_axes, local_heads, shard_shape, units_of
from partition.sizes import format_size
from partition.stages import cut_stages
from partition.tiers import DEFAULT_SLOTS, MIN_SLOTS, TierChoice, choose_tiers, minimum_bytes, pinned_bytes

DEFAULT_MAX_REQUESTS = 64
DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}
NUM_DEVICE_SLOTS = 2
_LEAST_DEVICE_RESERVE_BYTES = 1 << 30  # CUDA context, communication buffers, fragmentation
_DEVICE_RESERVE_PER_CENT = 5


def unit_bytes(unit: UnitSpec, cut: AxisCut, tp_rank: int, dtype: str) -> int:
    """Length of the rank's packed blob of a unit."""
    sizes = [
        math.prod(shard_shape(parameter, cut, tp_rank)) * DTYPE_BYTES[parameter.dtype or dtype]
        for parameter in unit.parameters
    ]
    return blob_layout(sizes)[1]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage before tiers are chosen. `sizes[unit][tp_rank]` in bytes."""

    node: int
    first_layer: int
    end_layer: int
    names: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """Positions of the embedding and the head."""
        return tuple(i for i, name in enumerate(self.names) if name in ("embed", "head"))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Everything that is settled before memory is shared out."""

    spec: ModelSpec
    hardware: HardwareFacts
    options: PlanOptions
    cut: AxisCut
    stages: tuple[Stage, ...]
    limits: dict[int, HostLimit]
    max_batch_tokens: int
    max_requests: int
    wanted_slots: int
    least_slots: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All ranks, and what was decided about KV."""

    ranks: tuple[RankPlan, ...]
    kv: KvDecision


def prepare(spec: ModelSpec, hardware: HardwareFacts, options: PlanOptions) -> Work:
    """Check the options, cut axes and layers, place stages, set host limits. Raises ConfigError and BudgetError."""
    _check(options, spec)
    cut = cut_axes(spec, options.tensor)
    sizes: dict[str, tuple[int, ...]] = {}
    by_kind: dict[str, tuple[int, ...]] = {}  # layers of one kind weigh the same
    kinds = {f"layers.{i}": kind for i, kind in enumerate(spec.layer_kinds)}
    units = units_of(spec)
    for unit in units:
        kind = kinds.get(unit.name, unit.name)
        if kind not in by_kind:
            by_kind[kind] = tuple(unit_bytes(unit, cut, rank, options.dtype) for rank in range(options.tensor))
        sizes[unit.name] = by_kind[kind]
    ranges = cut_stages(
        [sum(sizes[f"layers.{i}"]) for i in range(spec.num_layers)],
        embed_bytes=sum(sizes["embed"]),
        head_bytes=sum(sizes["head"]),
        num_stages=options.pipeline,
    )
    nodes = place_stages(hardware, tensor=options.tensor, pipeline=options.pipeline, device=options.device)
    stages = []
    for (first, end), node in zip(ranges, nodes, strict=True):
        names = tuple(f"layers.{i}" for i in range(first, end))
        names = ("embed", *names) if first == 0 else names
        names = (*names, "head") if end == spec.num_layers else names
        stages.append(
            Stage(node=node, first_layer=first, end_layer=end, names=names, sizes=tuple(sizes[n] for n in names))
        )
    return Work(
        spec=spec,
        hardware=hardware,
        options=options,
        cut=cut,
        stages=tuple(stages),
        limits=host_limits(hardware, nodes, options),
        max_batch_tokens=options.max_batch_tokens or DEFAULT_BATCH_TOKENS[options.device],
        max_requests=options.max_requests or DEFAULT_MAX_REQUESTS,
        wanted_slots=options.num_slots or DEFAULT_SLOTS,
        least_slots=options.num_slots or MIN_SLOTS,
    )


def _check(options: PlanOptions, spec: ModelSpec) -> None:
    if options.device not in DEFAULT_BATCH_TOKENS:
        raise ConfigError(f"device is {options.device!r}, but must be one of {', '.join(DEFAULT_BATCH_TOKENS)}")
    if options.dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {options.dtype!r}, but must be one of {', '.join(DTYPE_BYTES)}")
    if options.device == "cpu" and options.device_memory is not None:
        raise ConfigError("offload.device_memory is set, but there is no device: on cpu use offload.host_memory")
    for key, value, least in (
        ("parallel.tensor", options.tensor, 1),
        ("parallel.pipeline", options.pipeline, 1),
        ("offload.num_slots", options.num_slots, MIN_SLOTS),
        ("engine.block_tokens", options.block_tokens, 1),
        ("engine.max_batch_tokens", options.max_batch_tokens, 1),
        ("engine.max_requests", options.max_requests, 1),
        ("engine.max_model_len", options.max_model_len, 2),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{key} is {value}, but must be at least {least}")
    if options.max_model_len is not None and options.max_model_len > spec.max_position:
        raise ConfigError(
            f"engine.max_model_len is {options.max_model_len}, but the model knows only {spec.max_position} positions"
        )


def lay_out(work: Work, *, micro_batches: int) -> Layout:
    """Share out memory for steps of `micro_batches`. Raises BudgetError when the minimum does not fit."""
    options, cuda = work.options, work.options.device == "cuda"
    activation = [
        [_activation_bytes(work, stage, tp, micro_batches) for tp in range(options.tensor)] for stage in work.stages
    ]
    heads = [local_heads(work.spec, work.cut, tp)[1] for tp in range(options.tensor)]
    token_layer = (work.spec.head_dim + work.spec.v_head_dim) * DTYPE_BYTES[options.dtype]
    block = [
        [n * token_layer * options.block_tokens * (stage.end_layer - stage.first_layer) for n in heads]
        for stage in work.stages
    ]
    kv = decide_kv(_pools(work, activation, block), work.spec, options, max_requests=work.max_requests)
    fixed = [[a + kv.num_blocks * b for a, b in zip(*row, strict=True)] for row in zip(activation, block, strict=True)]
    nothing = [[0] * options.tensor for _ in work.stages]
    on_device = (
        [_choose_device(work, stage, taken) for stage, taken in zip(work.stages, fixed, strict=True)] if cuda else []
    )
    on_host = _choose_host(work, nothing if cuda else fixed, on_device)
    on_node = {stage.node: sum(other.node == stage.node for other in work.stages) for stage in work.stages}
    ranks = []
    for number, stage in enumerate(work.stages):
        tiers = _tiers(stage, on_host[number], on_device[number] if cuda else None)
        streams = any(tier == "nvme" for tier in tiers)
        cores = work.hardware.nodes[stage.node].cores // (on_node[stage.node] * options.tensor)
        for tp in range(options.tensor):
            ranks.append(
                RankPlan(
                    rank=number * options.tensor + tp,
                    stage=number,
                    tp_rank=tp,
                    node=stage.node,
                    first_layer=stage.first_layer,
                    end_layer=stage.end_layer,
                    units=tuple(
                        UnitPlacement(name=name, tier=tier, num_bytes=size[tp])
                        for name, tier, size in zip(stage.names, tiers, stage.sizes, strict=True)
                    ),
                    num_slots=on_host[number].num_slots,
                    slot_bytes=(on_device if cuda else on_host)[number].slot_bytes[tp],
                    num_device_slots=on_device[number].num_slots if cuda else 0,
                    num_kv_heads=heads[tp],
                    num_kv_blocks=kv.num_blocks,
                    kv_bytes=kv.num_blocks * block[number][tp],
                    activation_bytes=activation[number][tp],
                    # reading threads beside computing ones slow both, so a core is left to them where there are several
                    threads=max(1, cores - 1 if streams and cores > 2 else cores),
                )
            )
    return Layout(ranks=tuple(ranks), kv=kv)


def _pools(work: Work, activation: list[list[int]], block: list[list[int]]) -> list[Pool]:
    """The memories that hold KV: on cpu each node's, on cuda each rank's device."""
    pools = []
    slots = work.least_slots if work.options.device == "cpu" else NUM_DEVICE_SLOTS
    members = [(number, tp) for number in range(len(work.stages)) for tp in range(work.options.tensor)]
    weights = {(n, tp): sum(unit[tp] for unit in work.stages[n].sizes) for n, tp in members}
    least = {
        (n, tp): minimum_bytes(work.stages[n].sizes, slots=slots, pinned_first=work.stages[n].ends)[tp]
        for n, tp in members
    }
    pinned = {(n, tp): pinned_bytes(work.stages[n].sizes, work.stages[n].ends, slots=slots)[tp] for n, tp in members}
    if work.options.device == "cuda":
        groups = [
            (
                f"rank {n * work.options.tensor + tp}",
                "offload.device_memory",
                _device_limit(work, work.stages[n]),
                [(n, tp)],
            )
            for n, tp in members
        ]
    else:
        groups = [
            (
                f"node {work.hardware.nodes[node].name}",
                "offload.host_memory",
                limit.limit_bytes,
                [(n, tp) for n, tp in members if work.stages[n].node == node],
            )
            for node, limit in work.limits.items()
        ]
    for name, key, budget, own in groups:
        pools.append(
            Pool(
                name=name,
                key=key,
                budget_bytes=budget,
                activation_bytes=sum(activation[n][tp] for n, tp in own),
                weight_bytes=sum(weights[at] for at in own),
                least_weight_bytes=sum(least[at] for at in own),
                pinned_weight_bytes=sum(pinned[at] for at in own),
                block_bytes=sum(block[n][tp] for n, tp in own),
                largest_block_bytes=max(block[n][tp] for n, tp in own),
            )
        )
    return pools


def _device_limit(work: Work, stage: Stage) -> int:
    have = min(device.memory_bytes for device in work.hardware.nodes[stage.node].devices)
    if work.options.device_memory is None:
        return max(0, have - max(_LEAST_DEVICE_RESERVE_BYTES, have * _DEVICE_RESERVE_PER_CENT // 100))
    if work.options.device_memory > have:
        raise BudgetError(
            f"offload.device_memory is {format_size(work.options.device_memory)}, but the devices of node "
            f"{work.hardware.nodes[stage.node].name} have {format_size(have)}: lower it"
        )
    return work.options.device_memory


def _choose_device(work: Work, stage: Stage, fixed: Sequence[int]) -> TierChoice:
    limit = _device_limit(work, stage)
    choice = choose_tiers(
        stage.sizes,
        [limit - taken for taken in fixed],
        pinned_first=stage.ends,
        num_slots=NUM_DEVICE_SLOTS,
        min_slots=NUM_DEVICE_SLOTS,
    )
    if choice is None:
        need = max(
            taken + least
            for taken, least in zip(fixed, minimum_bytes(stage.sizes, pinned_first=stage.ends), strict=True)
        )
        raise _misfit(f"a device of node {work.hardware.nodes[stage.node].name}", need, limit, "offload.device_memory")
    return choice


def _choose_host(work: Work, fixed: list[list[int]], on_device: list[TierChoice]) -> list[TierChoice]:
    """Host residency of each stage for the units that are not on a device; the stages of a node share its memory."""
    chosen: list[TierChoice | None] = [None] * len(work.stages)
    for node, limit in work.limits.items():
        numbers = [n for n, stage in enumerate(work.stages) if stage.node == node]
        sizes, floors, ends = {}, {}, {}
        for n in numbers:
            stays = on_device[n].resident if on_device else (False,) * len(work.stages[n].names)
            sizes[n] = [unit for unit, there in zip(work.stages[n].sizes, stays, strict=True) if not there]
            places = [i for i, there in enumerate(stays) if not there]
            ends[n] = [places.index(i) for i in work.stages[n].ends if i in places]
            floors[n] = on_device[n].slot_bytes if on_device else (0,) * work.options.tensor
        whole = {n: sum(map(sum, sizes[n])) for n in numbers}
        least = {
            n: sum(minimum_bytes(sizes[n], slots=work.least_slots, pinned_first=ends[n])) if sizes[n] else 0
            for n in numbers
        }
        taken = sum(sum(fixed[n]) for n in numbers)
        free = limit.limit_bytes - taken - sum(least.values())
        name = f"node {work.hardware.nodes[node].name}"
        if free < 0:
            raise _misfit(name, taken + sum(least.values()), limit.limit_bytes, "offload.host_memory")
        spare = sum(whole[n] - least[n] for n in numbers)
        for n in numbers:
            # every stage its minimum, the rest in proportion to what it would like beyond that
            share = least[n] + ((whole[n] - least[n]) * min(free, spare) // spare if spare else 0)
            if not sizes[n]:
                chosen[n] = _nothing_streamed(work.options.tensor)
                continue
            chosen[n] = choose_tiers(
                sizes[n],
                [share],
                pinned_first=() if on_device else work.stages[n].ends,
                num_slots=work.wanted_slots,
                min_slots=work.least_slots,
                least_slot_bytes=floors[n],
            )
            if chosen[n] is None:
                raise _misfit(name, taken + sum(least.values()), limit.limit_bytes, "offload.host_memory")
    return [choice for choice in chosen if choice is not None]


def _nothing_streamed(tensor: int) -> TierChoice:
    return TierChoice(resident=(), num_slots=0, slot_bytes=(0,) * tensor, used_bytes=(0,) * tensor)


def _misfit(where: str, need: int, have: int, key: str) -> BudgetError:
    return BudgetError(
        f"the plan needs at least {format_size(need)} on {where}, which may use {format_size(have)}: raise {key}, "
        f"lower engine.kv_memory or engine.max_batch_tokens, or spread the model with parallel.tensor or "
        f"parallel.pipeline over more machines"
    )


def _tiers(stage: Stage, on_host: TierChoice, on_device: TierChoice | None) -> list[Tier]:
    if on_device is None:
        return ["host" if stays else "nvme" for stays in on_host.resident]
    rest = iter(on_host.resident)
    return ["device" if there else "host" if next(rest) else "nvme" for there in on_device.resident]


def _activation_bytes(work: Work, stage: Stage, tp_rank: int, micro_batches: int) -> int:
    """An estimate: hidden states of a whole step (in and out), the largest intermediates of one micro-batch (attention
    scores in bounded slices), on the last stage logits of every request, and on its tp_rank 0 what drawing takes."""
    spec, dims, size = work.spec, work.spec.dims, DTYPE_BYTES[work.options.dtype]
    tokens = work.max_batch_tokens
    q_heads, kv_heads = local_heads(spec, work.cut, tp_rank)
    attention = 2 * q_heads * spec.head_dim + 2 * kv_heads * (spec.head_dim + spec.v_head_dim)
    mlp = 3 * dims.get("inter", 0) // work.options.tensor
    routed = dims.get("experts_per_token", 0) * dims.get("moe_inter", 0) + dims.get("shared_inter", 0)
    widest = max(
        attention, mlp, 3 * routed // work.options.tensor + dims.get("experts_per_token", 0) * spec.hidden_size
    )
    logits = 0
    if "head" in stage.names:  # in float32, as they come and joined from the tensor ranks, and what drawing takes
        drawing = min(SAMPLING_BYTES_PER_LOGIT * work.max_requests * spec.vocab_size, SAMPLING_BYTES)
        logits = (
            3 * work.max_requests * spec.vocab_size * 4 + drawing
            if tp_rank == 0
            else work.max_requests * (-(-spec.vocab_size // work.options.tensor) * 8)
        )
    longest = work.options.max_model_len or min(spec.max_position, DEFAULT_MAX_MODEL_LEN)
    scores = min(ATTENTION_SCORES, tokens * longest * max(1, q_heads // max(1, kv_heads)))
    return ATTENTION_BYTES_PER_SCORE * scores + (
        2 * tokens * micro_batches * spec.hidden_size * size + tokens * (4 * spec.hidden_size + widest) * size + logits
    )
