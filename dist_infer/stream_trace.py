"""The last passes of a streaming benchmark in Chrome's trace format, for ui.perfetto.dev or chrome://tracing.

One process per rank, one thread per lane; the batch sizes follow each other with a gap between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_infer.stream_bench import StreamBench
from dist_infer.stream_figures import RankPasses
from offload.timeline import TimelineEvent

_GAP = 0.1  # of a batch's time, before the next batch
_PASSES, _WAITS, _COMPUTE, _CHECKS, _READS, _COPIES = 1, 2, 3, 4, 100, 200  # lanes; the last two plus the slot
_LANES = {"wait": _WAITS, "compute": _COMPUTE, "verify": _CHECKS}
_NAMES = {_PASSES: "passes", _WAITS: "waiting for units", _COMPUTE: "computing", _CHECKS: "checksums"}


def chrome_trace(bench: StreamBench) -> dict[str, Any]:
    """A JSON document: complete events, times in microseconds from the first one on, and the lanes' names."""
    found: list[dict[str, Any]] = []
    lanes: set[tuple[int, int]] = set()
    offset_s = 0.0
    for batch, ranks in bench.pictures:
        start_s, end_s = _span(ranks)
        for rank in ranks:
            for event in _events(rank, batch, offset_s - start_s):
                lanes.add((rank.rank, event["tid"]))
                found.append(event)
        offset_s += (1 + _GAP) * (end_s - start_s)
    ranks_seen = sorted({number for number, _ in lanes})
    names = [_meta("process_name", number, 0, {"name": f"rank {number}"}) for number in ranks_seen]
    for number, lane in sorted(lanes):
        names.append(_meta("thread_name", number, lane, {"name": _lane_name(lane)}))
        names.append(_meta("thread_sort_index", number, lane, {"sort_index": lane}))
    found.sort(key=lambda event: (event["pid"], event["tid"], event["ts"]))
    about = {"model": bench.model_type, "dtype": bench.dtype, "reader": bench.reader, "verdict": bench.verdict}
    return {"traceEvents": names + found, "displayTimeUnit": "ms", "otherData": about}


def _events(rank: RankPasses, batch: int, shift_s: float) -> Iterator[dict[str, Any]]:
    for record in rank.passes:
        arguments = {"batch": batch, "tokens": record.num_tokens, "bytes_read": record.bytes_read}
        yield _complete(
            f"batch {batch}, step {record.step_id}",
            "pass",
            rank.rank,
            _PASSES,
            (record.start_s + shift_s, record.end_s + shift_s),
            arguments,
        )
    for event in rank.events:
        span = (event.start_s + shift_s, event.end_s + shift_s)
        arguments = {"batch": batch, "slot": event.slot, "bytes": event.num_bytes}
        yield _complete(event.unit, event.kind, rank.rank, _lane(event), span, arguments)


def _lane(event: TimelineEvent) -> int:
    if event.kind == "read":
        return _READS + event.slot
    return _COPIES + event.slot if event.kind == "copy" else _LANES[event.kind]


def _lane_name(lane: int) -> str:
    if lane >= _COPIES:
        return f"copies to device slot {lane - _COPIES}"
    return f"reads into slot {lane - _READS}" if lane >= _READS else _NAMES[lane]


def _complete(
    name: str, category: str, rank: int, lane: int, span: tuple[float, float], arguments: dict[str, int]
) -> dict[str, Any]:
    start_us, end_us = round(span[0] * 1e6, 3), round(span[1] * 1e6, 3)
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": start_us,
        "dur": max(0.0, round(end_us - start_us, 3)),
        "pid": rank,
        "tid": lane,
        "args": arguments,
    }


def _meta(name: str, rank: int, lane: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": rank, "tid": lane, "args": arguments}


def _span(ranks: tuple[RankPasses, ...]) -> tuple[float, float]:
    """From the first begin to the last end of anything."""
    spans = [(each.start_s, each.end_s) for rank in ranks for each in rank.passes]
    spans += [(each.start_s, each.end_s) for rank in ranks for each in rank.events]
    return min(start for start, _ in spans), max(end for _, end in spans)
