"""What every rank and every stage shows in a scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from dist_infer.messages import StreamReport
from dist_infer.metrics.rank_watch import RankFigures, limited_by, overlap
from partition.plan import Plan
from partition.plan_data import RankPlan, Tier

_RANK = ["stage", "rank"]
_TIERS: tuple[Tier, ...] = ("device", "host", "nvme", "rows")
_COUNTERS: tuple[tuple[str, str, Callable[[StreamReport], float]], ...] = (
    ("stream_passes", "Passes over the weights", lambda report: report.num_passes),
    ("stream_read_bytes", "Bytes of weights read from disk", lambda report: report.bytes_read),
    ("stream_copied_bytes", "Bytes of weights copied from host to device", lambda report: report.bytes_copied),
    ("stream_stall_seconds", "Waiting for weights", lambda report: report.stall_s),
    ("rank_busy_seconds", "Working on steps, waits included", lambda report: report.busy_s),
    ("rank_communication_seconds", "In tensor-parallel collectives", lambda report: report.communication_s),
    ("rank_compute_seconds", "Busy, less stalls and communication", lambda report: report.compute_s),
    ("rank_tokens", "Tokens computed", lambda report: report.num_tokens),
    ("read_retries", "Reads that were repeated after an error", lambda report: report.num_read_retries),
    ("slow_reads", "Reads that took far longer than the others", lambda report: report.num_slow_reads),
)


def rank_families(found: RankFigures) -> Iterator[Metric]:
    """In the order of docs/metrics.md. `rows`: an embedding on disk of which a pass reads the rows it needs."""
    labels = {rank.rank: [str(rank.stage), str(rank.rank)] for rank in found.plan.ranks}
    for name, words, value in _COUNTERS:
        family = CounterMetricFamily(f"dist_infer_{name}", words, labels=_RANK)
        for report in found.reports:
            family.add_metric(labels[report.rank], value(report))
        yield family
    info = GaugeMetricFamily(
        "dist_infer_rank_info", "Where a rank runs; always 1", labels=[*_RANK, "host", "pid", "device"]
    )
    for worker in found.workers:
        info.add_metric([*labels[worker.rank], worker.host, str(worker.pid), found.plan.device], 1)
    yield info
    weights = GaugeMetricFamily(
        "dist_infer_rank_weight_bytes", "Bytes of weights by where they live", labels=[*_RANK, "tier"]
    )
    units = GaugeMetricFamily("dist_infer_rank_units", "Units by where they live", labels=[*_RANK, "tier"])
    for rank in found.plan.ranks:
        for tier in _tiers(rank):
            weights.add_metric([*labels[rank.rank], tier], rank.bytes_in(tier))
            units.add_metric([*labels[rank.rank], tier], sum(unit.tier == tier for unit in rank.units))
    yield weights
    yield units
    yield from _stages(found)


def _stages(found: RankFigures) -> Iterator[Metric]:
    overlaps = GaugeMetricFamily(
        "dist_infer_stage_overlap_ratio", "Share of the last 10 s of work without a wait for weights", labels=["stage"]
    )
    bounds = GaugeMetricFamily(
        "dist_infer_stage_bound_by", "1 for what most of the last 10 s of work went to", labels=["stage", "by"]
    )
    for stage, ranks in sorted(found.spent_by_stage().items()):
        if (share := overlap(ranks)) is not None:
            overlaps.add_metric([str(stage)], share)
        limit = limited_by(found.plan, ranks)
        for name in _limits(found.plan):
            bounds.add_metric([str(stage), name], float(name == limit))
    yield overlaps
    yield bounds


def _tiers(rank: RankPlan) -> tuple[Tier, ...]:
    has_rows = any(unit.tier == "rows" for unit in rank.units)
    return _TIERS if has_rows else _TIERS[:-1]


def _limits(plan: Plan) -> tuple[str, ...]:
    """`link`, between host and device, only where there is one."""
    return ("disk", "network", "compute", *(("link",) if plan.device == "cuda" else ()))
