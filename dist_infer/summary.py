"""What a run did, in the words and units that people compare: measured figures only, each from the run itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_infer.messages import StreamReport
from dist_infer.outputs import RequestOutput
from partition.cost import predict
from partition.hardware import HardwareFacts
from partition.plan import Plan


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Seconds are wall-clock, rates are per second of wall-clock, bytes count all ranks together.

    ttft_s: median from arrival to first token. tpot_s: median of (latency - TTFT) / (output tokens - 1).
    tokens_per_pass: computed tokens (prompt and output) for each pass over the weights. raw_disk_bytes_per_s: O_DIRECT
    read of the store, measured at start. stall_s: the longest-waiting rank. bound_by: where the slowest stage's time
    went: disk (or link) stalls, network (collectives) or compute. predicted_*: the plan's cost model for decoding as
    many requests a pass as there were on average.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    wall_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_s: float | None
    tpot_s: float | None
    num_passes: int
    bytes_per_pass: int
    stream_bytes_per_s: float
    raw_disk_bytes_per_s: float
    stall_s: float
    tokens_per_pass: float
    resident_fraction: float
    bound_by: str
    predicted_tokens_per_s: float
    predicted_bound_by: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    *,
    plan: Plan,
    outputs: Sequence[RequestOutput],
    before: Sequence[StreamReport],
    after: Sequence[StreamReport],
    wall_s: float,
    facts: HardwareFacts,
) -> RunSummary:
    """before, after: the ranks' cumulative reports around the run. facts: of the first node, measured at start.

    Of ranks that were lost there may be no report: then they count as if they had just begun, or done nothing.
    """
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    starts, ends = ({report.rank: report for report in reports} for reports in (before, after))
    none = [nothing(rank) for rank in range(len(plan.ranks))]
    spent = [difference(starts.get(each.rank, each), ends.get(each.rank, each)) for each in none]
    passes = max((report.num_passes for report in spent), default=0)
    read = sum(report.bytes_copied if plan.device == "cuda" else report.bytes_read for report in spent)
    total = sum(unit.num_bytes for rank in plan.ranks for unit in rank.units)
    streamed = sum(rank.streamed_bytes_per_pass for rank in plan.ranks)
    slowest = max(spent, key=lambda report: report.busy_s)
    wall = max(wall_s, 1e-9)
    prediction = predict(
        plan.model,
        plan.ranks,
        facts,
        dtype=plan.dtype,
        batch=max(1, round(generated / passes)) if passes else 1,
        steps_in_flight=plan.max_steps_in_flight,
    )
    return RunSummary(
        num_requests=len(outputs),
        num_prompt_tokens=prompt,
        num_output_tokens=generated,
        wall_s=wall_s,
        output_tokens_per_s=generated / wall,
        total_tokens_per_s=(prompt + generated) / wall,
        ttft_s=_median([output.metrics.ttft_s for output in outputs]),
        tpot_s=_median([output.metrics.tpot_s for output in outputs]),
        num_passes=passes,
        bytes_per_pass=read // passes if passes else 0,
        stream_bytes_per_s=read / wall,
        raw_disk_bytes_per_s=facts.nodes[0].disk_bytes_per_s,
        stall_s=max(report.stall_s for report in spent),
        tokens_per_pass=max(report.num_tokens for report in spent) / passes if passes else 0.0,
        resident_fraction=1.0 - streamed / total,
        bound_by=bound_by(plan, [report for report in spent if _stage(plan, report) == _stage(plan, slowest)]),
        predicted_tokens_per_s=prediction.decode_tokens_per_s,
        predicted_bound_by=prediction.bound_by,
    )


def difference(start: StreamReport, end: StreamReport) -> StreamReport:
    """What one rank did between two of its cumulative reports; of one that was replaced in between, since it began."""
    if end.num_passes < start.num_passes or end.busy_s < start.busy_s:
        start = nothing(end.rank)
    return StreamReport(
        rank=end.rank,
        num_passes=end.num_passes - start.num_passes,
        bytes_read=end.bytes_read - start.bytes_read,
        bytes_copied=end.bytes_copied - start.bytes_copied,
        stall_s=end.stall_s - start.stall_s,
        busy_s=end.busy_s - start.busy_s,
        communication_s=end.communication_s - start.communication_s,
        compute_s=end.compute_s - start.compute_s,
        num_tokens=end.num_tokens - start.num_tokens,
    )


def nothing(rank: int) -> StreamReport:
    """Of a rank that has just begun."""
    return StreamReport(
        rank=rank,
        num_passes=0,
        bytes_read=0,
        bytes_copied=0,
        stall_s=0.0,
        busy_s=0.0,
        communication_s=0.0,
        compute_s=0.0,
        num_tokens=0,
    )


def _stage(plan: Plan, report: StreamReport) -> int:
    return plan.ranks[report.rank].stage


def bound_by(plan: Plan, ranks: Sequence[StreamReport]) -> str:
    """Of one stage's ranks. A rank that waits in a collective for a stalled peer is bound by that peer's stall."""
    parts = {
        "link" if plan.device == "cuda" and not any(r.bytes_read for r in ranks) else "disk": max(
            r.stall_s for r in ranks
        ),
        "network": min(r.communication_s for r in ranks),
        "compute": max(r.compute_s for r in ranks),
    }
    return max(parts, key=lambda name: parts[name])


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
