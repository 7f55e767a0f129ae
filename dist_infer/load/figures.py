"""Records to figures: rates, latencies, goodput, errors by kind."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_infer.load.record import Record
from dist_infer.load.run import Measured
from partition.errors import ConfigError

_SLO_NAMES = ("ttft", "tpot", "e2e")
_UNITS_S = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of a set of times, in seconds."""

    mean: float
    median: float
    p90: float
    p99: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of nothing."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            mean=math.fsum(ordered) / len(ordered),
            median=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
            highest=ordered[-1],
        )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of an ascending, non-empty sequence."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, kw_only=True)
class LoadFigures:
    """Times in seconds; rates over `seconds`, from the start to the end of the last request.

    ttft from when a request was due, e2e likewise; tpot is a request's mean time of a token behind its first; itl the
    time between two pieces of a stream, over all requests. late: how long after it was due a request was sent; when
    that is not small against ttft, the client was too slow for this load. token_source: `usage` when the server
    counted, `pieces` when one piece of a stream was taken for one token. goodput: requests a second that met every
    objective; good_share: of all requests, failed ones included.
    """

    num_requests: int
    num_completed: int
    errors: dict[str, int]
    seconds: float
    requests_per_s: float
    output_tokens: int
    output_tokens_per_s: float
    prompt_tokens: int | None
    total_tokens_per_s: float | None
    token_source: str
    peak_in_flight: int
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    late: Spread | None
    slo_s: dict[str, float]
    goodput_per_s: float | None
    good_share: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_slo(text: str) -> dict[str, float]:
    """`ttft=500ms,tpot=50ms,e2e=10s` to seconds. Raises ConfigError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (each.strip() for each in part.partition("="))
        matched = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s)", value)
        if name not in _SLO_NAMES or matched is None or name in found:
            raise ConfigError(
                f"--slo {part!r}: write name=time once each, e.g. ttft=500ms; names: {', '.join(_SLO_NAMES)}"
            )
        found[name] = float(matched[1]) * _UNITS_S[matched[2]]
    return found


def load_figures(measured: Measured, slo_s: dict[str, float] | None = None) -> LoadFigures:
    """slo_s: objectives by name, from read_slo."""
    slo = slo_s or {}
    done = [record for record in measured.records if record.error is None]
    seconds = measured.seconds
    output_tokens = sum(record.num_tokens for record in done)
    prompt_tokens = sum(record.num_prompt_tokens or 0 for record in done)
    is_counted = bool(done) and all(record.num_output_tokens is not None for record in done)
    num_good = sum(_is_good(record, slo) for record in done)
    return LoadFigures(
        num_requests=len(measured.records),
        num_completed=len(done),
        errors=dict(Counter(record.error for record in measured.records if record.error).most_common()),
        seconds=seconds,
        requests_per_s=_rate(len(done), seconds),
        output_tokens=output_tokens,
        output_tokens_per_s=_rate(output_tokens, seconds),
        prompt_tokens=prompt_tokens if is_counted else None,
        total_tokens_per_s=_rate(prompt_tokens + output_tokens, seconds) if is_counted else None,
        token_source="usage" if is_counted else "pieces",
        peak_in_flight=max((count for _, count in in_flight(measured.records)), default=0),
        ttft=Spread.of(record.ttft_s for record in done if record.ttft_s is not None),
        tpot=Spread.of(record.tpot_s for record in done if record.tpot_s is not None),
        itl=Spread.of(gap for record in done for gap in record.gaps_s()),
        e2e=Spread.of(record.e2e_s for record in done),
        late=Spread.of(record.sent_s - record.due_s for record in measured.records),
        slo_s=slo,
        goodput_per_s=_rate(num_good, seconds) if slo else None,
        good_share=num_good / len(measured.records) if slo and measured.records else None,
    )


def in_flight(records: Iterable[Record]) -> list[tuple[float, int]]:
    """(time, open requests) at each begin and end, in order of time."""
    changes = sorted((at, change) for record in records for at, change in ((record.sent_s, 1), (record.end_s, -1)))
    count = 0
    found = []
    for at, change in changes:
        count += change
        found.append((at, count))
    return found


def _is_good(record: Record, slo_s: dict[str, float]) -> bool:
    """A request of one token has no tpot, and meets any."""
    values = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.e2e_s}
    return all(value is None or value <= slo_s.get(name, math.inf) for name, value in values.items())


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
