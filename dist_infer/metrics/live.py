"""What happened between two scrapes, in the figures of `dist-infer top`."""

from __future__ import annotations

from dataclasses import dataclass

from dist_infer.metrics.histogram import quantile
from dist_infer.metrics.scraped import Scraped

TIERS = ("device", "host", "nvme", "rows")
_MOVES = ("read", "copied")


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """bytes_by_tier: weights. bytes_per_s: read, or on a GPU copied, in the interval. Shares are of the rank's working
    time in the last ten seconds; bound_by: its stage's. Both are empty when idle."""

    rank: int
    stage: int
    host: str
    device: str
    bytes_by_tier: dict[str, float]
    bytes_per_s: float
    stall_share: float | None
    compute_share: float | None
    network_share: float | None
    bound_by: str


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Rates are per second of the interval; None where nothing was there to be measured. (p50, p99) in seconds."""

    model: str
    version: str
    phase: str
    progress: tuple[str, float] | None
    seconds: float
    num_running: int
    num_waiting: int
    num_open: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    steps_per_s: float
    kv_used_share: float
    num_kv_blocks: int
    ttft: tuple[float, float] | None
    inter_token: tuple[float, float] | None
    num_preemptions: int
    num_failed: int
    num_refused: int
    ranks: tuple[RankRow, ...]


def busy_s(scraped: Scraped) -> float:
    """Of all ranks together, since they began."""
    return scraped.sum("dist_infer_rank_busy_seconds_total")


def frame(before: Scraped, after: Scraped, work: tuple[Scraped, Scraped] | None) -> Frame:
    """work: between which the ranks' shares are taken; None when they were idle.

    A counter that went back was begun anew: it counts from 0. ValueError for scrapes of something else.
    """
    seconds = max(after.at_s - before.at_s, 1e-9)
    build = after.labels("dist_infer_build_info")
    phases = after.labels("dist_infer_phase")
    if not build or not phases:
        raise ValueError("there is no dist_infer_build_info in it")
    steps = after.samples.get("dist_infer_load_progress_ratio", ())

    def grown(name: str, **labels: str) -> float:
        return _grown(before, after, name, **labels)

    return Frame(
        model=build[0]["model"],
        version=build[0]["version"],
        phase=phases[0]["phase"],
        progress=(steps[0][0]["step"], steps[0][1]) if steps else None,
        seconds=seconds,
        num_running=int(after.sum("dist_infer_requests_running")),
        num_waiting=int(after.sum("dist_infer_requests_waiting")),
        num_open=int(after.sum("dist_infer_http_open_answers")),
        prompt_tokens_per_s=grown("dist_infer_prompt_tokens_total") / seconds,
        output_tokens_per_s=grown("dist_infer_generated_tokens_total") / seconds,
        steps_per_s=grown("dist_infer_steps_total") / seconds,
        kv_used_share=after.sum("dist_infer_kv_used_ratio"),
        num_kv_blocks=int(after.sum("dist_infer_kv_blocks")),
        ttft=_quantiles(before, after, "dist_infer_time_to_first_token_seconds"),
        inter_token=_quantiles(before, after, "dist_infer_inter_token_seconds"),
        num_preemptions=int(grown("dist_infer_preemptions_total")),
        num_failed=int(grown("dist_infer_requests_total", end="failed")),
        num_refused=int(grown("dist_infer_http_refused_total")),
        ranks=_ranks(before, after, work),
    )


def _quantiles(before: Scraped, after: Scraped, name: str) -> tuple[float, float] | None:
    then = dict(before.buckets(name))
    now = after.buckets(name)
    if any(total < then.get(bound, 0.0) for bound, total in now):
        then = {}
    grown = [(bound, total - then.get(bound, 0.0)) for bound, total in now]
    half, most = quantile(grown, 0.5), quantile(grown, 0.99)
    return None if half is None or most is None else (half, most)


def _grown(before: Scraped, after: Scraped, name: str, **labels: str) -> float:
    now, then = after.sum(name, **labels), before.sum(name, **labels)
    return now - then if now >= then else now


def _ranks(before: Scraped, after: Scraped, work: tuple[Scraped, Scraped] | None) -> tuple[RankRow, ...]:
    seconds = max(after.at_s - before.at_s, 1e-9)
    rows = []
    for labels in after.labels("dist_infer_rank_info"):
        rank, stage = labels["rank"], labels["stage"]
        moved = max(_grown(before, after, f"dist_infer_stream_{how}_bytes_total", rank=rank) for how in _MOVES)
        bound = after.labels("dist_infer_stage_bound_by", stage=stage)
        rows.append(
            RankRow(
                rank=int(rank),
                stage=int(stage),
                host=labels["host"],
                device=labels["device"],
                bytes_by_tier={tier: after.sum("dist_infer_rank_weight_bytes", rank=rank, tier=tier) for tier in TIERS},
                bytes_per_s=moved / seconds,
                stall_share=_share(work, "dist_infer_stream_stall_seconds_total", rank),
                compute_share=_share(work, "dist_infer_rank_compute_seconds_total", rank),
                network_share=_share(work, "dist_infer_rank_communication_seconds_total", rank),
                bound_by=bound[0]["by"] if bound and work is not None else "",
            )
        )
    return tuple(sorted(rows, key=lambda row: row.rank))


def _share(work: tuple[Scraped, Scraped] | None, name: str, rank: str) -> float | None:
    """Of the rank's working time."""
    busy = 0.0 if work is None else _grown(*work, "dist_infer_rank_busy_seconds_total", rank=rank)
    return None if work is None or busy <= 0 else min(1.0, _grown(*work, name, rank=rank) / busy)
