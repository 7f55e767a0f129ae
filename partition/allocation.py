"""Memory to ranks: activations, then KV and weights together by predicted speed, then one RankPlan a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partition.activations import activation_bytes
from partition.cost import StageLoad, predict_loads
from partition.errors import BudgetError
from partition.kv_budget import TIE, KvDecision, Pool, decide_kv
from partition.kv_layout import layers_kv, paged_bytes_per_token, ring_bytes_per_request, ring_rows_of
from partition.plan_data import DTYPE_BYTES, KvChoice, Prediction, RankPlan, UnitPlacement
from partition.sizes import format_size
from partition.tiers import Cycle, TierChoice
from partition.work import Stage, Work

NUM_DEVICE_SLOTS = 2
_LEAST_DEVICE_RESERVE_BYTES = 1 << 30  # CUDA context, communication buffers, fragmentation
_DEVICE_RESERVE_PER_CENT = 5


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All ranks, what was decided about KV, and what the stages move and compute."""

    ranks: tuple[RankPlan, ...]
    loads: tuple[StageLoad, ...]
    kv: KvDecision
    ring_rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Tiers:
    """The choices of all stages. On cuda `on_host` is about the units that are not on the device."""

    on_device: tuple[TierChoice, ...]
    on_host: tuple[TierChoice, ...]


class _Sharing:
    """The memory of all stages, for steps of a given size: what is fixed, and what any number of KV blocks leaves.

    `block` and `ring`: [stage][tp_rank] bytes of one KV block, and of the rings of all requests.
    """

    def __init__(self, work: Work, micro_batches: int, ring_rows: tuple[int, ...]) -> None:
        options = work.options
        self.work = work
        self.cuda = options.device == "cuda"
        self.tensor = range(options.tensor)
        self.ring_rows = ring_rows
        layers = [layers_kv(work.spec, work.cut, tp, ring_rows) for tp in self.tensor]
        self.heads = [of_rank[0].num_heads for of_rank in layers]
        own = [[of_rank[stage.first_layer : stage.end_layer] for of_rank in layers] for stage in work.stages]
        self.activation = [
            [activation_bytes(work, stage, tp, micro_batches, ring_rows) for tp in self.tensor] for stage in work.stages
        ]
        self.block = [[options.block_tokens * paged_bytes_per_token(kv, options.dtype) for kv in row] for row in own]
        self.ring = [[work.max_requests * ring_bytes_per_request(kv, options.dtype) for kv in row] for row in own]
        self._rest: dict[tuple[int, tuple[bool, ...]], Cycle] = {}

    def tiers(self, num_blocks: int) -> _Tiers:
        """Raises BudgetError when the weights do not fit beside so many blocks."""
        taken = [
            [a + num_blocks * b + r for a, b, r in zip(*row, strict=True)]
            for row in zip(self.activation, self.block, self.ring, strict=True)
        ]
        if not self.cuda:
            cycles = [stage.cycle for stage in self.work.stages]
            nothing = [(0,) * len(self.tensor) for _ in cycles]
            return _Tiers(on_device=(), on_host=self._on_host([sum(row) for row in taken], cycles, nothing))
        pairs = zip(self.work.stages, taken, strict=True)
        on_device = tuple(_choose_device(self.work, stage, fixed) for stage, fixed in pairs)
        rest = [self._rest_of(stage, choice) for stage, choice in zip(self.work.stages, on_device, strict=True)]
        on_host = self._on_host([0] * len(rest), rest, [choice.slot_bytes for choice in on_device])
        return _Tiers(on_device=on_device, on_host=on_host)

    def loads(self, tiers: _Tiers) -> tuple[StageLoad, ...]:
        """What the stages move and compute then."""
        return tuple(
            StageLoad(
                node=stage.node,
                num_ranks=len(self.tensor),
                on_cuda=self.cuda,
                num_layers=stage.end_layer - stage.first_layer,
                layer_parameters=sum(u.active_parameters for name, u in stage.units.items() if name != "head"),
                head_parameters=stage.units["head"].active_parameters if "head" in stage.units else 0,
                disk_bytes=sum(tiers.on_host[number].streamed_bytes),
                link_bytes=max(tiers.on_device[number].streamed_bytes) if self.cuda else 0,
                weight_bytes=sum(sum(u.num_bytes) for name, u in stage.units.items() if name != "embed"),
            )
            for number, stage in enumerate(self.work.stages)
        )

    def trial(self, num_blocks: int, batch: int) -> KvChoice | None:
        """What so many blocks would give; None when the weights do not fit beside them."""
        try:
            tiers = self.tiers(num_blocks)
        except BudgetError:
            return None
        prediction = predict_step(self.work, self.loads(tiers), batch)
        stays = tiers.on_device if self.cuda else tiers.on_host
        slots = [choice.num_slots * sum(choice.slot_bytes) for choice in stays]
        return KvChoice(
            num_blocks=num_blocks,
            batch=batch,
            kv_bytes=num_blocks * sum(map(sum, self.block)) + sum(map(sum, self.ring)),
            resident_bytes=sum(sum(choice.used_bytes) for choice in stays) - sum(slots),
            tokens_per_s=prediction.decode_tokens_per_s,
        )

    def pools(self) -> list[Pool]:
        """The memories that hold KV: on cpu each node's, on cuda each rank's device."""
        work = self.work
        slots = NUM_DEVICE_SLOTS if self.cuda else work.least_slots
        whole = [tuple(map(sum, zip(*stage.sizes, strict=True))) for stage in work.stages]
        least = [stage.cycle.minimum_bytes(slots) for stage in work.stages]
        pinned = [stage.cycle.pinned_bytes(slots) for stage in work.stages]
        members = [(number, tp) for number in range(len(work.stages)) for tp in self.tensor]
        if self.cuda:
            groups = [
                (
                    f"rank {n * len(self.tensor) + tp}",
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
        return [
            Pool(
                name=name,
                key=key,
                budget_bytes=budget,
                activation_bytes=sum(self.activation[n][tp] for n, tp in own),
                weight_bytes=sum(whole[n][tp] for n, tp in own),
                least_weight_bytes=sum(least[n][tp] for n, tp in own),
                pinned_weight_bytes=sum(pinned[n][tp] for n, tp in own),
                block_bytes=sum(self.block[n][tp] for n, tp in own),
                largest_block_bytes=max(self.block[n][tp] for n, tp in own),
                ring_bytes=sum(self.ring[n][tp] for n, tp in own),
                largest_ring_bytes=max(self.ring[n][tp] for n, tp in own),
            )
            for name, key, budget, own in groups
        ]

    def _rest_of(self, stage: Stage, choice: TierChoice) -> Cycle:
        """The units that are not on the device, for choosing host or nvme."""
        key = (id(stage.cycle), choice.resident)
        if key not in self._rest:
            places = [i for i, there in enumerate(choice.resident) if not there]
            self._rest[key] = Cycle(
                [stage.sizes[i] for i in places],
                pinned_first=[places.index(i) for i in stage.ends if i in places],
                num_ranks=len(self.tensor),
            )
        return self._rest[key]

    def _on_host(
        self, taken: Sequence[int], cycles: Sequence[Cycle], floors: Sequence[Sequence[int]]
    ) -> tuple[TierChoice, ...]:
        """Host residency of each stage's cycle; the stages of a node share its memory, of which `taken` is gone."""
        work = self.work
        chosen: dict[int, TierChoice] = {}
        for node, limit in work.limits.items():
            numbers = [n for n, stage in enumerate(work.stages) if stage.node == node]
            whole = {n: cycles[n].total_bytes for n in numbers}
            least = {n: sum(cycles[n].minimum_bytes(work.least_slots, floors[n])) for n in numbers}
            gone = sum(taken[n] for n in numbers)
            free = limit.limit_bytes - gone - sum(least.values())
            spare = sum(whole[n] - least[n] for n in numbers)
            left = 0
            for n in numbers:
                # every stage its minimum, the rest in proportion to what it would like beyond that, and what the
                # stages before it had no use for
                share = left + least[n] + ((whole[n] - least[n]) * min(free, spare) // spare if spare else 0)
                choice = cycles[n].choose(
                    [share], num_slots=work.wanted_slots, min_slots=work.least_slots, least_slot_bytes=floors[n]
                )
                if free < 0 or choice is None:
                    name = f"node {work.hardware.nodes[node].name}"
                    raise _misfit(name, gone + sum(least.values()), limit.limit_bytes, "offload.host_memory")
                chosen[n] = choice
                left = share - sum(choice.used_bytes)
        return tuple(chosen[n] for n in range(len(cycles)))


def lay_out(work: Work, *, micro_batches: int) -> Layout:
    """Share out memory for steps of `micro_batches`. Raises BudgetError when the minimum does not fit.

    Windowed layers keep rings unless blocks, of which a few short requests take less, decode faster.
    """
    rings = ring_rows_of(
        work.spec,
        max_batch_tokens=work.max_batch_tokens,
        max_model_len=work.options.longest_sequence(work.spec),
    )
    if not any(rings):
        return _lay_out(work, micro_batches, ())
    try:
        in_rings = _lay_out(work, micro_batches, rings)
    except BudgetError as misfit:
        try:
            return _lay_out(work, micro_batches, ())
        except BudgetError as error:
            raise BudgetError(f"{error} (with rings for windowed layers instead of blocks: {misfit})") from misfit
    try:
        in_blocks = _lay_out(work, micro_batches, ())
    except BudgetError:
        return in_rings
    rates = [predict_step(work, found.loads, found.kv.batch).decode_tokens_per_s for found in (in_rings, in_blocks)]
    slower = rates[0] < TIE * rates[1] or in_rings.kv.max_model_len < in_blocks.kv.max_model_len
    return in_blocks if slower else in_rings


def _lay_out(work: Work, micro_batches: int, ring_rows: tuple[int, ...]) -> Layout:
    sharing = _Sharing(work, micro_batches, ring_rows)
    kv = decide_kv(sharing.pools(), work.spec, work.options, max_requests=work.max_requests, trial=sharing.trial)
    tiers = sharing.tiers(kv.num_blocks)
    on_node = {stage.node: sum(other.node == stage.node for other in work.stages) for stage in work.stages}
    ranks = []
    for number, stage in enumerate(work.stages):
        on_host, on_device = tiers.on_host[number], tiers.on_device[number] if tiers.on_device else None
        cores = work.hardware.nodes[stage.node].cores // (on_node[stage.node] * work.options.tensor)
        for tp in sharing.tensor:
            units = _placements(stage, tp, on_host, on_device)
            streams = any(unit.tier == "nvme" for unit in units)
            ranks.append(
                RankPlan(
                    rank=number * work.options.tensor + tp,
                    stage=number,
                    tp_rank=tp,
                    node=stage.node,
                    first_layer=stage.first_layer,
                    end_layer=stage.end_layer,
                    units=units,
                    num_slots=on_host.num_slots,
                    slot_bytes=(on_device or on_host).slot_bytes[tp],
                    num_device_slots=on_device.num_slots if on_device else 0,
                    num_kv_heads=sharing.heads[tp],
                    num_kv_blocks=kv.num_blocks,
                    kv_bytes=kv.num_blocks * sharing.block[number][tp] + sharing.ring[number][tp],
                    activation_bytes=sharing.activation[number][tp],
                    # reading threads beside computing ones slow both, so a core is left to them where there are several
                    threads=max(1, cores - 1 if streams and cores > 2 else cores),
                )
            )
    return Layout(ranks=tuple(ranks), loads=sharing.loads(tiers), kv=kv, ring_rows=ring_rows)


def steps_in_flight(loads: Sequence[StageLoad]) -> int:
    """As many as stages, except where stages share a disk: there a second step in flight reads nothing faster, and each
    pass would serve only a part of the requests."""
    own_nodes = len({load.node for load in loads}) == len(loads)
    return len(loads) if own_nodes or not any(load.disk_bytes for load in loads) else 1


def predict_step(work: Work, loads: Sequence[StageLoad], batch: int) -> Prediction:
    """Decoding `batch` requests."""
    return predict_loads(
        loads,
        work.hardware,
        hidden_bytes=work.spec.hidden_size * DTYPE_BYTES[work.options.dtype],
        batch=batch,
        steps_in_flight=steps_in_flight(loads),
        max_batch_tokens=work.max_batch_tokens,
    )


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
    choice = stage.cycle.choose(
        [limit - taken for taken in fixed], num_slots=NUM_DEVICE_SLOTS, min_slots=NUM_DEVICE_SLOTS
    )
    if choice is None:
        least = stage.cycle.minimum_bytes(NUM_DEVICE_SLOTS)
        need = max(taken + weights for taken, weights in zip(fixed, least, strict=True))
        raise _misfit(f"a device of node {work.hardware.nodes[stage.node].name}", need, limit, "offload.device_memory")
    return choice


def _misfit(where: str, need: int, have: int, key: str) -> BudgetError:
    return BudgetError(
        f"the plan needs at least {format_size(need)} on {where}, which may use {format_size(have)}: raise {key}, "
        f"lower engine.kv_memory or engine.max_batch_tokens, or spread the model with parallel.tensor or "
        f"parallel.pipeline over more machines"
    )


def _placements(stage: Stage, tp: int, on_host: TierChoice, on_device: TierChoice | None) -> tuple[UnitPlacement, ...]:
    rest = iter(zip(on_host.resident, on_host.cuts, strict=True))
    placed = [UnitPlacement(name=name, tier="rows", num_bytes=unit.num_bytes[tp]) for name, unit in stage.rows.items()]
    for index, (name, unit) in enumerate(stage.units.items()):
        size = unit.num_bytes[tp]
        if on_device is not None and on_device.resident[index]:
            placed.append(UnitPlacement(name=name, tier="device", num_bytes=size))
            continue
        stays, cut = next(rest)
        placed.append(
            UnitPlacement(
                name=name,
                tier="host" if stays else "nvme",
                num_bytes=size,
                kept_bytes=cut.kept_bytes[tp] if cut else 0,
                streamed_from=cut.streamed_from[tp] if cut else 0,
            )
        )
    return tuple(placed)
