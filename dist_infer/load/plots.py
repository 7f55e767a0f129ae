"""The report's drawings as inline SVG: distributions of latencies, and the run over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dist_infer.load.figures import in_flight, percentile
from dist_infer.load.record import Record

_WIDTH_PX = 1060
_HEIGHT_PX = 210
_LEFT_PX = 58
_TOP_PX = 10
_BOTTOM_PX = 34
_MAX_POINTS = 400
_TARGET_TICKS = 8
_NUM_BUCKETS = 120

Point = tuple[float, float]


def distribution_picture(name: str, values: Sequence[float]) -> str:
    """How many percent of the values (seconds) are below each time, with the median and p99 marked."""
    ordered = sorted(values)
    step = max(1, len(ordered) // _MAX_POINTS)
    points = [(1e3 * ordered[index], 100 * (index + 1) / len(ordered)) for index in range(0, len(ordered), step)]
    points = [(points[0][0], 0.0), *points, (1e3 * ordered[-1], 100.0)]
    marks = [
        (f"{words}: {1e3 * percentile(ordered, at):.1f} ms", 1e3 * percentile(ordered, at))
        for words, at in (("median", 50), ("p99", 99))
    ]
    return _chart(f"{name}: share of values below a time", points, "ms", "%", "line one", marks)


def rate_picture(records: Sequence[Record], seconds: float) -> str:
    """Pieces of answers a second, over the run."""
    width = max(seconds, 1e-9) / _NUM_BUCKETS
    counts = [0] * _NUM_BUCKETS
    for record in records:
        for at in record.chunk_s:
            counts[min(_NUM_BUCKETS - 1, max(0, int(at / width)))] += 1
    points = [(index * width, count / width) for index, count in enumerate(counts)]
    return _chart("pieces of answers a second, over the run", points, "s", "/s", "line two", [])


def in_flight_picture(records: Sequence[Record]) -> str:
    """Open requests over the run, as steps."""
    changes = in_flight(records)
    step = max(1, len(changes) // (2 * _MAX_POINTS))
    points: list[Point] = [(0.0, 0.0)]
    for at, count in changes[::step]:
        points += [(at, points[-1][1]), (at, float(count))]
    if changes:
        points.append((changes[-1][0], float(changes[-1][1])))
    return _chart("open requests, over the run", points, "s", "", "line three", [])


def ttft_picture(records: Sequence[Record]) -> str:
    """A dot for each request: when it was due, and how long its first piece took. Failed ones stand at the bottom."""
    dots = [(record.due_s, 1e3 * record.ttft_s, "dot") for record in records if record.ttft_s is not None]
    dots += [(record.due_s, 0.0, "dot bad") for record in records if record.error is not None]
    dots = dots[:: max(1, len(dots) // (10 * _MAX_POINTS))]
    return _chart("time to the first token, by when a request was due", [], "s", "ms", "", [], dots)


def _chart(
    label: str,
    points: Sequence[Point],
    x_unit: str,
    y_unit: str,
    kind: str,
    marks: Sequence[tuple[str, float]],
    dots: Sequence[tuple[float, float, str]] = (),
) -> str:
    """One set of axes from zero. marks: upright lines with words, at a place of the x axis."""
    x_ticks = _ticks(max([x for x, _ in points] + [x for x, _, _ in dots], default=1.0))
    y_ticks = _ticks(max([y for _, y in points] + [y for _, y, _ in dots], default=1.0))
    x_scale = (_WIDTH_PX - _LEFT_PX - 20) / x_ticks[-1]
    bottom = _HEIGHT_PX - _BOTTOM_PX
    y_scale = (bottom - _TOP_PX) / y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT_PX + x * x_scale, bottom - y * y_scale

    parts: list[str] = []
    for tick in y_ticks:
        _, y = at(0, tick)
        parts.append(f'<line class="grid" x1="{_LEFT_PX}" y1="{y:.1f}" x2="{_WIDTH_PX - 20}" y2="{y:.1f}"/>')
        parts.append(_word(_LEFT_PX - 6, y + 4, f"{tick:g}{' ' if y_unit == 'ms' else ''}{y_unit}", "axis", "end"))
    for tick in x_ticks:
        x, _ = at(tick, 0)
        parts.append(_word(x, bottom + 16, f"{tick:g} {x_unit}", "axis", "middle"))
    if points:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
    parts += [
        f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
        for x, y, style in ((*at(x, y), style) for x, y, style in dots)
    ]
    for row, (words, place) in enumerate(marks):
        x, _ = at(place, 0)
        is_right = x > _WIDTH_PX - 160
        parts.append(f'<line class="mark" x1="{x:.1f}" y1="{_TOP_PX}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(
            _word(x + (-5 if is_right else 5), bottom - 8 - 16 * row, words, "", "end" if is_right else "start")
        )
    view = f'viewBox="0 0 {_WIDTH_PX} {_HEIGHT_PX}"'
    return f'<svg {view} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _word(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to the first at or above `highest`."""
    if not highest > 0:
        return [0.0, 1.0]
    raw = highest / _TARGET_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999999)
    return [index * step for index in range(math.ceil(highest / step * 0.999999) + 1)]
