"""make_plan: a model, machines and options in; which rank owns what, where, and at what cost out. Pure arithmetic.

In order: cut the axes and the layers, place stages on nodes, share each memory between KV and weights so that the
predicted speed is greatest, choose tiers, predict. What does not fit ends here with need, have and the option to turn.
"""

from __future__ import annotations

import math
from functools import cache

from pydantic import TypeAdapter, ValidationError

from partition.allocation import lay_out, predict_step, steps_in_flight
from partition.blob_spec import unit_bytes
from partition.errors import BudgetError, ConfigError
from partition.hardware import HardwareFacts
from partition.kv_budget import describe_kv
from partition.model_spec import ModelSpec
from partition.plan_data import (
    DTYPE_BYTES,
    ROW_STAGING_BYTES,
    KvChoice,
    NodeBudget,
    Plan,
    PlanOptions,
    Prediction,
    RankPlan,
    Tier,
    UnitPlacement,
)
from partition.shares import stage_shares
from partition.work import Work, prepare

__all__ = [
    "DTYPE_BYTES",
    "KvChoice",
    "NodeBudget",
    "Plan",
    "PlanOptions",
    "Prediction",
    "RankPlan",
    "Tier",
    "UnitPlacement",
    "describe",
    "describe_kv",
    "make_plan",
    "plan_from_json",
    "plan_to_json",
    "unit_bytes",
]

MAX_MICRO_BATCHES = 16
WORTH_CUTTING = 1.05  # times as fast as stages of equal size: theirs is the cut that never moves
_LEAST_ROWS = 4  # an embedding of so many times what reading its rows takes is worth leaving on disk
_SLOWER_FOR_PROMPTS = 0.97  # decoding may become so much slower so that long prompts take fewer passes


def make_plan(spec: ModelSpec, hardware: HardwareFacts, options: PlanOptions) -> Plan:
    """The plan. Raises ConfigError for options that contradict each other or the model, BudgetError for a misfit."""
    embedding_bytes = spec.vocab_size * spec.hidden_size * DTYPE_BYTES.get(options.dtype, 0)
    worth_it = embedding_bytes >= _LEAST_ROWS * ROW_STAGING_BYTES
    if not options.embedding_rows or options.device != "cpu" or not worth_it:
        return _cut_and_plan(spec, hardware, options, embedding_rows=False)
    try:
        whole = _cut_and_plan(spec, hardware, options, embedding_rows=False)
    except BudgetError as misfit:
        try:
            return _cut_and_plan(spec, hardware, options, embedding_rows=True)
        except BudgetError:
            raise misfit from None
    if not any(rank.streamed_bytes_per_pass for rank in whole.ranks):
        return whole
    rows = _cut_and_plan(spec, hardware, options, embedding_rows=True)
    faster = rows.prediction.decode_tokens_per_s > whole.prediction.decode_tokens_per_s
    return rows if faster else whole


def _cut_and_plan(spec: ModelSpec, hardware: HardwareFacts, options: PlanOptions, *, embedding_rows: bool) -> Plan:
    """With stages of equal size, or where nodes differ with stages to their measure, if that is worth it."""
    work = prepare(spec, hardware, options, embedding_rows=embedding_rows)
    shares = stage_shares(work)
    if shares is None:
        return _plan(work)
    measured = prepare(spec, hardware, options, embedding_rows=embedding_rows, shares=shares)
    try:
        even = _plan(work)
    except BudgetError as misfit:
        try:
            return _plan(measured)
        except BudgetError:
            raise misfit from None
    try:
        uneven = _plan(measured)
    except BudgetError:
        return even
    faster = uneven.prediction.decode_tokens_per_s > WORTH_CUTTING * even.prediction.decode_tokens_per_s
    return uneven if faster else even


def _plan(work: Work) -> Plan:
    spec, hardware, options = work.spec, work.hardware, work.options
    layout = lay_out(work, micro_batches=1)
    micro_batches = 1
    if any(rank.streamed_bytes_per_pass for rank in layout.ranks):
        # a step large enough that computing hides the streaming, if its hidden states fit and cost no residency
        alone = predict_step(work, layout.loads, layout.kv.batch)
        wanted = min(MAX_MICRO_BATCHES, math.ceil(alone.crossing_tokens / work.max_batch_tokens))
        while wanted > 1:
            try:
                larger = lay_out(work, micro_batches=wanted)
            except BudgetError:
                larger = None
            if larger is not None:
                decode = predict_step(work, larger.loads, larger.kv.batch).decode_tokens_per_s
                if decode >= _SLOWER_FOR_PROMPTS * alone.decode_tokens_per_s:
                    layout, micro_batches = larger, wanted
                    break
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
        max_steps_in_flight=steps_in_flight(layout.loads),
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
        prediction=predict_step(work, layout.loads, layout.kv.batch),
        encoding=options.encodings.name,
        kv_choices=layout.kv.choices,
        ring_rows=layout.ring_rows,
    )


def plan_to_json(plan: Plan) -> str:
    """The plan as JSON; `plan_from_json` gives back an equal plan."""
    return _adapter().dump_json(plan, indent=1).decode()


def plan_from_json(text: str | bytes) -> Plan:
    """The plan of that JSON. Raises ConfigError when it is none."""
    try:
        return _adapter().validate_json(text)
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
            "cut_units": sum(unit.kept_bytes > 0 for unit in rank.units),
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


@cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)  # takes longer to make than to use
