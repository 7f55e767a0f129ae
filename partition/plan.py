"""make_plan: a model, machines and options in; which rank owns what, where, and at what cost out. Pure arithmetic.

In order: cut the axes and the layers, place stages on nodes, set the KV blocks, give the rest of each memory to
weights, choose tiers, predict. What does not fit ends here with need, have and the option to turn.
"""

from __future__ import annotations

import math

from pydantic import TypeAdapter, ValidationError

from partition.allocation import Layout, Work, lay_out, prepare, unit_bytes
from partition.cost import predict
from partition.errors import BudgetError, ConfigError
from partition.hardware import HardwareFacts
from partition.model_spec import ModelSpec
from partition.plan_data import (
    DTYPE_BYTES,
    NodeBudget,
    Plan,
    PlanOptions,
    Prediction,
    RankPlan,
    Tier,
    UnitPlacement,
)

__all__ = [
    "DTYPE_BYTES",
    "NodeBudget",
    "Plan",
    "PlanOptions",
    "Prediction",
    "RankPlan",
    "Tier",
    "UnitPlacement",
    "describe",
    "make_plan",
    "plan_from_json",
    "plan_to_json",
    "unit_bytes",
]

MAX_MICRO_BATCHES = 16


def make_plan(spec: ModelSpec, hardware: HardwareFacts, options: PlanOptions) -> Plan:
    """The plan. Raises ConfigError for options that contradict each other or the model, BudgetError for a misfit."""
    work = prepare(spec, hardware, options)
    layout = lay_out(work, micro_batches=1)
    micro_batches = 1
    if any(rank.streamed_bytes_per_pass for rank in layout.ranks):
        # a step large enough that computing hides the streaming, if its hidden states fit
        crossing = _predict(work, layout).crossing_tokens
        wanted = min(MAX_MICRO_BATCHES, math.ceil(crossing / work.max_batch_tokens))
        while wanted > 1:
            try:
                layout, micro_batches = lay_out(work, micro_batches=wanted), wanted
                break
            except BudgetError:
                wanted //= 2
    used = {node: sum(rank.host_bytes for rank in layout.ranks if rank.node == node) for node in work.limits}
    return Plan(
        name=options.name,
        model=spec,
        tensor=options.tensor,
        pipeline=options.pipeline,
        dtype=options.dtype,
        device=options.device,
        ranks=layout.ranks,
        block_tokens=options.block_tokens,
        max_batch_tokens=work.max_batch_tokens,
        max_micro_batches=micro_batches,
        max_requests=work.max_requests,
        max_model_len=layout.kv.max_model_len,
        max_steps_in_flight=_steps_in_flight(work, layout),
        budgets=tuple(
            NodeBudget(
                node=node,
                name=hardware.nodes[node].name,
                limit_bytes=limit.limit_bytes,
                source=limit.source,
                footprint_bytes=limit.footprint_bytes,
                used_bytes=used[node],
            )
            for node, limit in work.limits.items()
        ),
        prediction=_predict(work, layout),
    )


def plan_to_json(plan: Plan) -> str:
    """The plan as JSON; `plan_from_json` gives back an equal plan."""
    return TypeAdapter(Plan).dump_json(plan, indent=1).decode()


def plan_from_json(text: str | bytes) -> Plan:
    """The plan of that JSON. Raises ConfigError when it is none."""
    try:
        return TypeAdapter(Plan).validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"this is not a plan: {error}") from error


def describe(plan: Plan) -> list[dict[str, str | int]]:
    """A row for each rank, for tables and JSON; bytes are plain numbers."""
    names = {budget.node: budget.name for budget in plan.budgets}
    return [
        {
            "rank": rank.rank,
            "node": names[rank.node],
            "stage": rank.stage,
            "tp_rank": rank.tp_rank,
            "layers": f"{rank.first_layer}-{rank.end_layer - 1}",
            "device_weights_bytes": rank.bytes_in("device"),
            "host_weights_bytes": rank.bytes_in("host"),
            "nvme_weights_bytes": rank.bytes_in("nvme"),
            "slots": rank.num_slots,
            "device_slots": rank.num_device_slots,
            "slot_bytes": rank.slot_bytes,
            "kv_blocks": rank.num_kv_blocks,
            "kv_bytes": rank.kv_bytes,
            "activation_bytes": rank.activation_bytes,
            "host_bytes": rank.host_bytes,
            "device_bytes": rank.device_bytes,
            "streamed_bytes_per_pass": rank.streamed_bytes_per_pass,
            "threads": rank.threads,
        }
        for rank in plan.ranks
    ]


def _steps_in_flight(work: Work, layout: Layout) -> int:
    """As many as stages, except where stages share a disk: there a second step in flight reads nothing faster, and each
    pass would serve only a part of the requests."""
    own_nodes = len({stage.node for stage in work.stages}) == len(work.stages)
    no_disk = not any(rank.bytes_in("nvme") for rank in layout.ranks)
    return work.options.pipeline if own_nodes or no_disk else 1


def _predict(work: Work, layout: Layout) -> Prediction:
    per_request = math.ceil(layout.kv.expected_len / work.options.block_tokens)
    batch = max(1, min(work.max_requests, layout.kv.num_blocks // per_request))
    return predict(
        work.spec,
        layout.ranks,
        work.hardware,
        dtype=work.options.dtype,
        batch=batch,
        steps_in_flight=_steps_in_flight(work, layout),
    )
