"""Seconds per pass, tokens per second, and what bounds them. The model, per stage and T tokens a pass:

    t = max( S/disk, S/link, 2·P_active·T/F, W/M ) + network

S bytes streamed per pass, F and M the stage's arithmetic and memory bandwidth, W its bytes of weights. The ranks of one
node share its disk, cores and memory. Below the crossing point T* (where 2·P_active·T/F = S/BW) more tokens are free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from partition.hardware import HardwareFacts
from partition.model_spec import ModelSpec
from partition.plan_data import DTYPE_BYTES, Prediction, RankPlan
from partition.sharding import UnitSpec, units_of


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


def stage_costs(
    spec: ModelSpec, ranks: Sequence[RankPlan], hardware: HardwareFacts, *, dtype: str, tokens: int, batch: int
) -> tuple[StageCost, ...]:
    """The cost of each stage for a pass with `tokens` tokens, `batch` of which need the head."""
    active = {unit.name: active_parameters(unit, spec) for unit in units_of(spec)}
    on_node = {rank.node: sum(1 for other in ranks if other.node == rank.node) for rank in ranks}
    costs = []
    num_stages = ranks[-1].stage + 1
    for stage in range(num_stages):
        own = [rank for rank in ranks if rank.stage == stage]
        node = hardware.nodes[own[0].node]
        if own[0].on_cuda:
            flops = sum(device.flops for device in node.devices[: len(own)])
            memory = sum(device.memory_bytes_per_s for device in node.devices[: len(own)])
            link = max(rank.streamed_bytes_per_pass for rank in own) / node.devices[0].link_bytes_per_s
        else:
            share = len(own) / on_node[own[0].node]
            flops, memory, link = node.flops * share, node.memory_bytes_per_s * share, 0.0
        names = [unit.name for unit in own[0].units]
        per_token = 2 * sum(active[name] for name in names if name != "head") / flops
        compute = per_token * tokens + 2 * (active["head"] if "head" in names else 0) * batch / flops
        disk = sum(rank.bytes_in("nvme") for rank in own) / node.disk_bytes_per_s
        crosses = stage + 1 < num_stages and ranks[(stage + 1) * len(own)].node != own[0].node
        hidden = tokens * spec.hidden_size * DTYPE_BYTES[dtype]
        seconds = {
            "disk": disk,
            "link": link,
            "compute": compute,
            "memory": sum(unit.num_bytes for rank in own for unit in rank.units if unit.name != "embed") / memory,
            "network": hidden / hardware.network_bytes_per_s if crosses else 0.0,
        }
        crossing = math.ceil(max(disk, link) / per_token) if per_token else 0
        costs.append(StageCost(node=own[0].node, seconds=seconds, crossing_tokens=crossing))
    return tuple(costs)


def predict(
    spec: ModelSpec,
    ranks: Sequence[RankPlan],
    hardware: HardwareFacts,
    *,
    dtype: str,
    batch: int,
    steps_in_flight: int,
) -> Prediction:
    """Decoding `batch` requests, a token each a step, spread over the steps in flight."""
    tokens = math.ceil(batch / steps_in_flight)
    costs = stage_costs(spec, ranks, hardware, dtype=dtype, tokens=tokens, batch=tokens)
    latency = sum(cost.total for cost in costs)
    worst = max(costs, key=lambda cost: cost.total)
    # with as many steps in flight as stages, one ends each time the slowest stage is through
    interval = max(latency / steps_in_flight, worst.total)
    assumed = {figure for rank in ranks for figure in hardware.nodes[rank.node].assumed}
    return Prediction(
        seconds_per_pass=latency,
        decode_tokens_per_s=batch / steps_in_flight / interval,
        bound_by=worst.bound_by,
        crossing_tokens=max(cost.crossing_tokens for cost in costs),
        tokens_per_pass=tokens,
        assumed=tuple(sorted(assumed)),
    )
