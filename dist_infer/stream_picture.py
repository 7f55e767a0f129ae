"""The report's drawings as inline SVG: the lanes of a rank's last passes, and where the time of a pass goes.

        ┌ labels ┐┌ plot, scrolls sideways when the units would be too narrow ┐
slot 0  read│ layers.0          │ layers.3        │
slot 1      │ layers.1              │ layers.4     │
waiting     ▮      ▮                ▮
computing    │ 0 │  │ 1 │
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from dist_infer.stream_figures import RankPasses, StreamRound
from offload.timeline import TimelineEvent

_LABELS_PX = 96
_PLOT_PX = 1060
_UNIT_PX = 17  # a unit gets this much of the plot at least
_LANE_PX = 22
_GAP_PX = 6
_TOP_PX = 24
_AXIS_PX = 26
_CHAR_PX = 6.6
_TARGET_TICKS = 12
_BAR_PX = 16


def lanes_picture(rank: RankPasses) -> str:
    """The passes of one rank: reads by slot, copies by device slot, checksums, waits, computation, each a lane."""
    start_s = rank.passes[0].start_s
    seconds = rank.passes[-1].end_s - start_s
    lanes = _lanes(rank.events)
    num_computed = sum(event.kind == "compute" for event in rank.events)
    width = max(_PLOT_PX, num_computed * _UNIT_PX)
    height = _TOP_PX + len(lanes) * (_LANE_PX + _GAP_PX) + _AXIS_PX
    scale = width / seconds
    plot: list[str] = []
    labels: list[str] = []
    ticks = _ticks(seconds)
    for tick in ticks:
        plot.append(_line(tick * scale, _TOP_PX, height - _AXIS_PX, "grid"))
        label = _duration(tick, ticks)
        if tick * scale + 3 + len(label) * _CHAR_PX <= width:  # the last one may not fit any more
            plot.append(_text(tick * scale + 3, height - 9, label, "axis"))
    for row, (label, events) in enumerate(lanes):
        top = _TOP_PX + row * (_LANE_PX + _GAP_PX)
        labels.append(_text(_LABELS_PX - 8, top + _LANE_PX / 2 + 4, label, "lane", "end"))
        plot.append(f'<rect class="track" x="0" y="{top}" width="{width}" height="{_LANE_PX}"/>')
        for event in events:
            plot.append(_block(event, max(0.0, event.start_s - start_s), event.end_s - start_s, seconds, scale, top))
    for record in rank.passes:
        x = (record.start_s - start_s) * scale
        plot.append(_line(x, 4, height - _AXIS_PX, "pass"))
        tokens = f"{record.num_tokens} token{'s' if record.num_tokens > 1 else ''}"
        words = f"pass of step {record.step_id}: {record.end_s - record.start_s:.3f} s, {tokens}"
        plot.append(_text(x + 5, 15, words, "passname"))
    return (
        '<div class="lanes">'
        f'<svg width="{_LABELS_PX}" height="{height}" role="presentation">{"".join(labels)}</svg>'
        f'<div class="scroll"><svg width="{width}" height="{height}" role="img" '
        f'aria-label="timeline of rank {rank.rank}">{"".join(plot)}</svg></div></div>'
    )


def shares_picture(batches: Sequence[tuple[int, StreamRound]]) -> str:
    """For each batch two bars on one scale of seconds: what the disk needs, and what the busiest process did."""
    longest = max(max(found.seconds_per_pass, found.read_s) for _, found in batches)
    scale = (_PLOT_PX - 150) / longest
    block = 2 * _BAR_PX + 30
    parts: list[str] = []
    for index, (batch, found) in enumerate(batches):
        top = index * block + 4
        parts.append(_text(_LABELS_PX - 8, top + _BAR_PX + 5, f"batch {batch}", "lane", "end"))
        parts.append(_bar(_LABELS_PX, top, found.read_s, scale, "read", "reading at the raw rate"))
        x = float(_LABELS_PX)
        spent = found.compute_s + found.communication_s + found.stall_s
        for kind, seconds, words in (
            ("compute", found.compute_s, "computing"),
            ("copy", found.communication_s, "waiting for other ranks"),
            ("wait", found.stall_s, "waiting for units"),
            ("rest", max(0.0, found.seconds_per_pass - spent), "between passes"),
        ):
            parts.append(_bar(x, top + _BAR_PX + 3, seconds, scale, kind, words))
            x += seconds * scale
        end = _LABELS_PX + max(found.seconds_per_pass, found.read_s) * scale + 8
        parts.append(_text(end, top + _BAR_PX + 6, f"{found.seconds_per_pass:.3f} s per pass", "axis"))
    height = len(batches) * block
    width = _LABELS_PX + _PLOT_PX
    return f'<svg class="shares" width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'


def _lanes(events: Sequence[TimelineEvent]) -> list[tuple[str, list[TimelineEvent]]]:
    lanes: list[tuple[str, list[TimelineEvent]]] = []
    for kind, label in (("read", "read, slot"), ("copy", "copy, slot")):
        for slot in sorted({event.slot for event in events if event.kind == kind}):
            own = [event for event in events if event.kind == kind and event.slot == slot]
            lanes.append((f"{label} {slot}", own))
    for kind, label in (("verify", "checksum"), ("wait", "stalled"), ("compute", "computing")):
        own = [event for event in events if event.kind == kind]
        if own or kind != "verify":
            lanes.append((label, own))
    return lanes


def _block(event: TimelineEvent, start_s: float, end_s: float, limit_s: float, scale: float, top: float) -> str:
    """A unit's time as a box, cut to the plot; its name is in it where there is room, all figures are its tip."""
    x, width = start_s * scale, (min(end_s, limit_s) - start_s) * scale
    milliseconds = 1e3 * (event.end_s - event.start_s)
    tip = f"{event.unit}: {event.kind} {milliseconds:.2f} ms"
    if event.kind in ("read", "copy") and milliseconds > 0:
        tip += f", {event.num_bytes / 1e6:.1f} MB at {event.num_bytes / 1e6 / milliseconds:.2f} GB/s, slot {event.slot}"
    elif event.kind == "compute" and event.slot < 0:
        tip += ", resident"
    box = (
        f'<rect class="{event.kind}{" resident" if event.kind == "compute" and event.slot < 0 else ""}" x="{x:.2f}" '
        f'y="{top}" width="{max(width, 0.6):.2f}" height="{_LANE_PX}" rx="2"/>'
    )
    name = ""
    for words in (event.unit, event.unit.removeprefix("layers.")):
        if len(words) * _CHAR_PX + 4 <= width:
            name = _text(x + width / 2, top + _LANE_PX / 2 + 4, words, "unit", "middle")
            break
    return f"<g><title>{escape(tip)}</title>{box}{name}</g>"


def _bar(x: float, y: float, seconds: float, scale: float, kind: str, words: str) -> str:
    width = seconds * scale
    label = f"{words} {seconds:.3f} s"
    inside = _text(x + 5, y + _BAR_PX - 4, label, "unit") if len(label) * _CHAR_PX + 8 <= width else ""
    box = f'<rect class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR_PX}" rx="2"/>'
    return f"<g><title>{escape(label)}</title>{box}{inside}</g>"


def _ticks(seconds: float) -> list[float]:
    """Round times from 0 on, about a dozen."""
    rough = seconds / _TARGET_TICKS
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * base for factor in (1, 2, 5, 10) if factor * base >= rough)
    return [index * step for index in range(math.ceil(seconds / step))]


def _duration(seconds: float, ticks: Iterable[float]) -> str:
    largest = max(ticks)
    if largest >= 1:
        return f"{seconds:g} s"
    return f"{1e3 * seconds:g} ms" if largest >= 1e-3 else f"{1e6 * seconds:g} µs"


def _line(x: float, top: float, bottom: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.2f}" y1="{top}" x2="{x:.2f}" y2="{bottom}"/>'


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.2f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
