"""Seconds per pass, tokens per second, and what bounds them. The model, per stage and T tokens a pass:

    t = max( S/disk, S/link, 2·P_active·T/F + o, W/M + o ) + network

S bytes streamed per pass (at rest: encoded ones, kept parts apart), F and M the stage's arithmetic and memory
bandwidth, W its bytes of weights at rest, o what a layer and micro-batch cost whatever its size, for all of them. The
ranks of one node share its disk, cores and memory; those of a stage add two all-reduces a layer to the network. Below
the crossing point T* (where 2·P_active·T/F + o = S/BW) more tokens are free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from partition.hardware import ASSUMED_ALL_REDUCE_S, ASSUMED_LAYER_OVERHEAD_S, HardwareFacts, NodeFacts
from partition.model_spec import ModelSpec
from partition.plan_data import DTYPE_BYTES, Prediction, RankPlan
from partition.sharding import UnitSpec, units_of

_REDUCES_PER_LAYER = 2  # after attention and after the MLP


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """What one stage moves and computes in a pass.

    Parameters are those that one token is multiplied with, the head's apart. `disk_bytes` and `weight_bytes` (without
    the embedding, of which a token reads a row) are those of all ranks, `link_bytes` of the rank that copies most.
    """

    node: int
    num_ranks: int
    on_cuda: bool
    num_layers: int
    layer_parameters: int
    head_parameters: int
    disk_bytes: int
    link_bytes: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Seconds of one pass of a stage, by what is waited for, and the tokens at which computing equals streaming."""

    node: int
    seconds: dict[str, float]
    crossing_tokens: int

    @property
    def total(self) -> float:
        """Reading, copying and computing overlap; the network does not."""
        return max(s for kind, s in self.seconds.items() if kind != "network") + self.seconds["network"]

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=lambda kind: self.seconds[kind])


def active_parameters(unit: UnitSpec, spec: ModelSpec) -> int:
    """Parameters of a unit that one token is multiplied with: the routed share of experts, none of embeddings."""
    if unit.name == "embed":
        return 0
    total = 0
    for parameter in unit.parameters:
        size = math.prod(parameter.shape)
        if ".experts." in parameter.name:
            size = size * spec.dims["experts_per_token"] // spec.dims["num_experts"]
        total += size
    return total


def stage_loads(spec: ModelSpec, ranks: Sequence[RankPlan]) -> tuple[StageLoad, ...]:
    """The loads of a plan's stages, in order."""
    active = {unit.name: active_parameters(unit, spec) for unit in units_of(spec)}
    loads = []
    for stage in range(ranks[-1].stage + 1):
        own = [rank for rank in ranks if rank.stage == stage]
        names = [unit.name for unit in own[0].units]
        loads.append(
            StageLoad(
                node=own[0].node,
                num_ranks=len(own),
                on_cuda=own[0].on_cuda,
                num_layers=own[0].end_layer - own[0].first_layer,
                layer_parameters=sum(active[name] for name in names if name != "head"),
                head_parameters=active["head"] if "head" in names else 0,
                disk_bytes=sum(rank.bytes_in("nvme") for rank in own),
                link_bytes=max(rank.streamed_bytes_per_pass for rank in own) if own[0].on_cuda else 0,
                weight_bytes=sum(unit.num_bytes for rank in own for unit in rank.units if unit.name != "embed"),
            )
        )
    return tuple(loads)


def costs_of(
    loads: Sequence[StageLoad],
    hardware: HardwareFacts,
    *,
    hidden_bytes: int,
    tokens: int,
    batch: int,
    micro_batches: int = 1,
) -> tuple[StageCost, ...]:
    """The cost of each stage for a pass with `tokens` tokens, `batch` of which need the head.

    hidden_bytes: of one token's hidden state, which goes from stage to stage.
    """
    on_node: dict[int, int] = {}
    for load in loads:
        on_node[load.node] = on_node.get(load.node, 0) + load.num_ranks
    costs = []
    for stage, load in enumerate(loads):
        node = hardware.nodes[load.node]
        if load.on_cuda:
            flops = sum(device.flops for device in node.devices[: load.num_ranks])
            memory = sum(device.memory_bytes_per_s for device in node.devices[: load.num_ranks])
            link = load.link_bytes / node.devices[0].link_bytes_per_s
        else:
            share = load.num_ranks / on_node[load.node]
            flops, memory, link = node.flops * share, node.memory_bytes_per_s * share, 0.0
        device = "cuda" if load.on_cuda else "cpu"
        per_token = 2 * load.layer_parameters / flops
        overhead = _layer_overhead(node, device) * load.num_layers * micro_batches
        reduces = 0.0
        if load.num_ranks > 1:
            reduces = _REDUCES_PER_LAYER * load.num_layers * micro_batches * ASSUMED_ALL_REDUCE_S[device]
        disk = load.disk_bytes / node.disk_bytes_per_s
        crosses = stage + 1 < len(loads) and loads[stage + 1].node != load.node
        seconds = {
            "disk": disk,
            "link": link,
            "compute": per_token * tokens + 2 * load.head_parameters * batch / flops + overhead,
            "memory": load.weight_bytes / memory + overhead,
            "network": (tokens * hidden_bytes / hardware.network_bytes_per_s if crosses else 0.0) + reduces,
        }
        streaming = max(disk, link)
        crossing = max(1, math.ceil((streaming - overhead) / per_token)) if streaming and per_token else 0
        costs.append(StageCost(node=load.node, seconds=seconds, crossing_tokens=crossing))
    return tuple(costs)


def predict(
    spec: ModelSpec,
    ranks: Sequence[RankPlan],
    hardware: HardwareFacts,
    *,
    dtype: str,
    batch: int,
    steps_in_flight: int,
    max_batch_tokens: int | None = None,
) -> Prediction:
    """Decoding `batch` requests, a token each a step, spread over the steps in flight.

    max_batch_tokens: of a micro-batch; without, a step is one.
    """
    return predict_loads(
        stage_loads(spec, ranks),
        hardware,
        hidden_bytes=spec.hidden_size * DTYPE_BYTES[dtype],
        batch=batch,
        steps_in_flight=steps_in_flight,
        max_batch_tokens=max_batch_tokens,
    )


def predict_loads(
    loads: Sequence[StageLoad],
    hardware: HardwareFacts,
    *,
    hidden_bytes: int,
    batch: int,
    steps_in_flight: int,
    max_batch_tokens: int | None = None,
) -> Prediction:
    """`predict` for the loads of all stages."""
    tokens = math.ceil(batch / steps_in_flight)
    micro_batches = math.ceil(tokens / max_batch_tokens) if max_batch_tokens else 1
    costs = costs_of(
        loads, hardware, hidden_bytes=hidden_bytes, tokens=tokens, batch=tokens, micro_batches=micro_batches
    )
    latency = sum(cost.total for cost in costs)
    worst = max(costs, key=lambda cost: cost.total)
    # with as many steps in flight as stages, one ends each time the slowest stage is through
    interval = max(latency / steps_in_flight, worst.total)
    nodes = [hardware.nodes[load.node] for load in loads]
    assumed = {figure for node in nodes for figure in node.assumed}
    if any(node.layer_overhead_s is None for node in nodes):
        assumed.add("layer_overhead_s")
    return Prediction(
        seconds_per_pass=latency,
        decode_tokens_per_s=batch / steps_in_flight / interval,
        bound_by=worst.bound_by,
        crossing_tokens=max(cost.crossing_tokens for cost in costs),
        tokens_per_pass=tokens,
        assumed=tuple(sorted(assumed)),
    )


def _layer_overhead(node: NodeFacts, device: str) -> float:
    """Seconds a layer and micro-batch."""
    if node.layer_overhead_s is not None:
        return node.layer_overhead_s
    return ASSUMED_LAYER_OVERHEAD_S[device]
