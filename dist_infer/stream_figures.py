"""From recorded passes to figures of streamed decoding: pure arithmetic and the words that go with it.

A round decodes one batch once. Of its passes only those count in which every request decodes, less the first of them:
    prefill … │ decode │ decode  decode … decode │ (requests end)
              anchor ──┘└─ n passes, timed from the anchor's end to the last one's ┘
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dist_infer.messages import PassRecord, TimelineReport, WorkerReport
from offload.timeline import TimelineEvent
from partition.errors import ConfigError
from partition.plan import Plan

FULL = 0.9
"""From this share of a pass's time on, what is waited for is called its bound."""

_NUM_NAMED = 3
_MOST_PASSES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class StreamRound:
    """One batch decoded once, per pass, over all ranks; seconds are wall-clock.

    seconds_per_pass: from the end of a pass to the end of the next. raw_bytes_per_s: mean of the raw reads just before
    and after, all nodes together. stall_s, compute_s, communication_s: of the process that was busiest, its stages
    together. read_s: what the bytes would take at the raw rate. exposed_s: of seconds_per_pass, what neither reading at
    the raw rate nor computing accounts for: the overlap that was missed.
    """

    number: int
    num_passes: int
    tokens_per_pass: float
    tokens_per_s: float
    seconds_per_pass: float
    bytes_per_pass: float
    copied_bytes_per_pass: float
    bytes_per_s: float
    raw_bytes_per_s: float
    percent_of_raw: float | None
    read_s: float
    stall_s: float
    compute_s: float
    communication_s: float
    exposed_s: float


@dataclass(frozen=True, kw_only=True)
class RankPasses:
    """The last passes of one rank, for pictures; times in seconds from the begin of the first of them."""

    rank: int
    passes: tuple[PassRecord, ...]
    events: tuple[TimelineEvent, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one round's timelines say; `StreamRound` adds the raw rate."""

    num_passes: int
    tokens_per_pass: float
    seconds_per_pass: float
    node_bytes: dict[int, float]  # read per pass by the ranks of each node
    copied_bytes: float
    stall_s: float
    compute_s: float
    communication_s: float
    stall_s_per_unit: dict[str, float]
    ranks: tuple[RankPasses, ...]


def measure_passes(
    plan: Plan, reports: Sequence[TimelineReport], workers: Sequence[WorkerReport], batch: int
) -> Measured:
    """Figures of a round in which `batch` requests were answered. reports, workers: of every rank, by rank.

    Raises:
        ConfigError: no two passes were alike; more new tokens are needed.
    """
    last = plan.ranks[-plan.tensor].rank  # samples: its passes end the steps
    ids = _steady_steps(reports[last].passes, max(1, batch // plan.max_steps_in_flight))
    if len(ids) < 2:
        raise ConfigError(
            f"batch {batch}: no two decode passes with all of its requests were seen: raise --new-tokens, "
            "or lower --prompt-tokens so that all prompts fit into fewer passes"
        )
    spans = {record.step_id: record for record in reports[last].passes}
    seconds = (spans[ids[-1]].end_s - spans[ids[0]].end_s) / (len(ids) - 1)
    counted = set(ids[1:])
    num_passes = len(counted)
    records = {report.rank: [record for record in report.passes if record.step_id in counted] for report in reports}
    groups: dict[tuple[str, int], list[PassRecord]] = {}
    for worker in workers:
        groups.setdefault((worker.host, worker.pid), []).extend(records[worker.rank])
    busiest = max(groups.values(), key=lambda group: sum(each.end_s - each.start_s for each in group))
    node_bytes: dict[int, float] = {}
    for rank in plan.ranks:
        read = sum(record.bytes_read for record in records[rank.rank]) / num_passes
        node_bytes[rank.node] = node_bytes.get(rank.node, 0.0) + read
    return Measured(
        num_passes=num_passes,
        tokens_per_pass=sum(spans[step].num_tokens for step in counted) / num_passes,
        seconds_per_pass=seconds,
        node_bytes=node_bytes,
        copied_bytes=sum(each.bytes_copied for group in records.values() for each in group) / num_passes,
        stall_s=sum(each.stall_s for each in busiest) / num_passes,
        compute_s=sum(each.compute_s for each in busiest) / num_passes,
        communication_s=sum(each.communication_s for each in busiest) / num_passes,
        stall_s_per_unit=_stalls(reports, counted),
        ranks=_shown(reports, ids[-min(_MOST_PASSES_SHOWN, num_passes) :]),
    )


def round_figures(number: int, measured: Measured, raw: Mapping[int, float]) -> StreamRound:
    """raw: bytes per second of each node's disk, around this round."""
    num_bytes, seconds = sum(measured.node_bytes.values()), measured.seconds_per_pass
    raw_total = sum(raw[node] for node in measured.node_bytes)
    read_s = max(count / raw[node] for node, count in measured.node_bytes.items())
    rate = num_bytes / seconds
    return StreamRound(
        number=number,
        num_passes=measured.num_passes,
        tokens_per_pass=measured.tokens_per_pass,
        tokens_per_s=measured.tokens_per_pass / seconds,
        seconds_per_pass=seconds,
        bytes_per_pass=num_bytes,
        copied_bytes_per_pass=measured.copied_bytes,
        bytes_per_s=rate,
        raw_bytes_per_s=raw_total,
        percent_of_raw=100 * rate / raw_total if num_bytes else None,
        read_s=read_s,
        stall_s=measured.stall_s,
        compute_s=measured.compute_s,
        communication_s=measured.communication_s,
        exposed_s=max(0.0, seconds - max(read_s, measured.compute_s + measured.communication_s)),
    )


def median_round(rounds: Sequence[StreamRound]) -> StreamRound:
    """Each figure's own median; `number` is how many rounds there were."""

    def of(name: str) -> float:
        return float(statistics.median(getattr(each, name) for each in rounds))

    return StreamRound(
        number=len(rounds),
        num_passes=rounds[0].num_passes,
        tokens_per_pass=of("tokens_per_pass"),
        tokens_per_s=of("tokens_per_s"),
        seconds_per_pass=of("seconds_per_pass"),
        bytes_per_pass=of("bytes_per_pass"),
        copied_bytes_per_pass=of("copied_bytes_per_pass"),
        bytes_per_s=of("bytes_per_s"),
        raw_bytes_per_s=of("raw_bytes_per_s"),
        percent_of_raw=None if rounds[0].percent_of_raw is None else of("percent_of_raw"),
        read_s=of("read_s"),
        stall_s=of("stall_s"),
        compute_s=of("compute_s"),
        communication_s=of("communication_s"),
        exposed_s=of("exposed_s"),
    )


def bound_by(found: StreamRound) -> str:
    """What most of a pass goes to: disk, compute or network."""
    parts = {"disk": found.read_s, "compute": found.compute_s, "network": found.communication_s}
    return max(parts, key=lambda name: parts[name])


def verdict(found: StreamRound, stall_s_per_unit: Mapping[str, float]) -> str:
    """One sentence: what limits this batch, and what would help."""
    seconds, bound = found.seconds_per_pass, bound_by(found)
    shares = {"disk": found.read_s / seconds, "compute": found.compute_s / seconds}
    if bound == "network":
        return (
            f"network-bound: tensor ranks wait {found.communication_s:.3f} of {seconds:.3f} s of a pass for each "
            "other: fewer tensor ranks, or a faster network between them, help"
        )
    if found.percent_of_raw is None:
        copied = found.copied_bytes_per_pass / seconds / 1e9
        link = f" and copied, {copied:.2f} GB/s from host to device," if copied else ""
        return (
            f"nothing is read from disk: a pass takes as long as it is computed{link} "
            f"({found.compute_s:.3f} of {seconds:.3f} s computing)"
        )
    if bound == "disk" and shares["disk"] >= FULL:
        return (
            f"disk-bound: reads run at {found.percent_of_raw:.0f} % of what this disk gives: only fewer bytes, more "
            "memory, more tokens in a pass or a faster disk help"
        )
    if bound == "compute" and shares["compute"] >= FULL:
        return (
            f"compute-bound: computing takes {found.compute_s:.3f} of {seconds:.3f} s of a pass, reading would take "
            f"{found.read_s:.3f} s: faster arithmetic or fewer tokens in a pass help, a faster disk does not"
        )
    longest = sorted(stall_s_per_unit, key=lambda unit: -stall_s_per_unit[unit])[:_NUM_NAMED]
    waits = f"; the longest waits are for {', '.join(longest)}" if found.stall_s > 0 and longest else ""
    return (
        f"neither is full: reading would take {100 * shares['disk']:.0f} % of a pass at the raw rate, computing takes "
        f"{100 * shares['compute']:.0f} %: {found.exposed_s:.3f} of {seconds:.3f} s are lost between them{waits}"
    )


def _steady_steps(passes: Sequence[PassRecord], least_tokens: int) -> list[int]:
    """Ids of the longest run of consecutive steps that decode a token each for at least so many requests."""
    best: list[int] = []
    run: list[int] = []
    for record in passes:
        if record.num_tokens == record.num_sampled >= least_tokens:
            run.append(record.step_id)
        else:
            run = []
        best = run if len(run) > len(best) else best
    return list(best)


def _stalls(reports: Sequence[TimelineReport], step_ids: set[int]) -> dict[str, float]:
    """Seconds per pass that each unit was waited for; of tensor ranks, which share a unit, the longest."""
    found: dict[str, float] = {}
    for report in reports:
        spans = [(record.start_s, record.end_s) for record in report.passes if record.step_id in step_ids]
        own: dict[str, float] = {}
        for event in report.events:
            if event.kind == "wait" and any(start <= event.start_s <= end for start, end in spans):
                own[event.unit] = own.get(event.unit, 0.0) + (event.end_s - event.start_s) / len(spans)
        for unit, seconds in own.items():
            found[unit] = max(found.get(unit, 0.0), seconds)
    return found


def _shown(reports: Sequence[TimelineReport], step_ids: Sequence[int]) -> tuple[RankPasses, ...]:
    """The given steps of every rank on one clock, that of the wall, from the first begin on."""
    wanted = set(step_ids)
    begins = [
        record.start_s + report.epoch_s for report in reports for record in report.passes if record.step_id in wanted
    ]
    zero = min(begins)
    shown = []
    for report in reports:
        shift = report.epoch_s - zero
        passes = [record for record in report.passes if record.step_id in wanted]
        start, end = passes[0].start_s, passes[-1].end_s
        events = [event for event in report.events if event.end_s > start and event.start_s < end]
        shown.append(
            RankPasses(
                rank=report.rank,
                passes=tuple(
                    replace(record, start_s=record.start_s + shift, end_s=record.end_s + shift) for record in passes
                ),
                events=tuple(
                    replace(event, start_s=event.start_s + shift, end_s=event.end_s + shift) for event in events
                ),
            )
        )
    return tuple(shown)
