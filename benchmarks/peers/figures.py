"""From the records of a measurement to figures: medians over rounds, one row a competitor and batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = Mapping[str, Any]  # one Record, as JSON has it


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians of the runs that ended well (None: there was none). Seconds, bytes, and rates per second.

    load_s: process start to ready. prefill_s: ready to the first token of every sequence. decode: tokens of all
    sequences after their first, per second; lowest and highest of the rounds beside it. whole: all new tokens over
    prefill and decode. read_rate: bytes the process read from disk during decode, raw_rate: O_DIRECT reads around it.
    """

    name: str
    weights: str
    batch: int
    capped: bool
    num_runs: int
    ended: str
    load_s: float | None
    prefill_s: float | None
    first_token_s: float | None
    decode: float | None
    decode_range: tuple[float, float] | None
    whole: float | None
    step_bytes: float | None
    read_rate: float | None
    raw_rate: float | None
    peak_bytes: float | None
    rss_bytes: float | None
    cpu_s: float | None
    tokens: tuple[tuple[int, ...], ...]


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """In the order of their first runs; what a killed competitor did without the cap is a row of its own."""
    groups: dict[tuple[str, int, bool], list[Run]] = {}
    for run in document["runs"]:
        groups.setdefault((run["competitor"], run["batch"], run["limit_bytes"] is not None), []).append(run)
    return [_row(name, batch, capped, runs) for (name, batch, capped), runs in groups.items()]


def agreement(row: Row, reference: Row) -> float | None:
    """Mean share of an answer's tokens before its first difference from the reference's."""
    pairs = list(zip(row.tokens, reference.tokens, strict=False))
    if not pairs:
        return None
    shares = []
    for mine, other in pairs:
        length = min(len(mine), len(other))
        same = next((i for i in range(length) if mine[i] != other[i]), length)
        shares.append(same / max(1, length))
    return statistics.mean(shares)


def _row(name: str, batch: int, capped: bool, runs: Sequence[Run]) -> Row:
    good = [run for run in runs if run["ended"] == "ok"]

    def median(value: Callable[[Run], float | None]) -> float | None:
        values = [found for run in good if (found := value(run)) is not None]
        return statistics.median(values) if values else None

    rates = [_decode(run) for run in good]
    return Row(
        name=name,
        weights=str(runs[0]["weights"]),
        batch=batch,
        capped=capped,
        num_runs=len(good),
        ended="ok" if good else str(runs[-1]["ended"]),
        load_s=median(lambda run: _loaded(run)["seconds"]),
        prefill_s=median(lambda run: _first(run)["seconds"] - _loaded(run)["seconds"]),
        first_token_s=median(lambda run: _first(run)["seconds"]),
        decode=median(_decode),
        decode_range=(min(rates), max(rates)) if rates else None,
        whole=median(lambda run: _last(run)["num_tokens"] / (_last(run)["seconds"] - _loaded(run)["seconds"])),
        step_bytes=median(lambda run: _decoded(run, "read_bytes") / (len(run["result"]["steps"]) - 1)),
        read_rate=median(lambda run: _decoded(run, "read_bytes") / _decoded(run, "seconds")),
        raw_rate=median(lambda run: max(run["raw_before"], run["raw_after"])),
        peak_bytes=median(lambda run: run["peak_bytes"]),
        rss_bytes=median(lambda run: run["result"]["max_rss_bytes"]),
        cpu_s=median(lambda run: run["cpu_s"]),
        tokens=tuple(tuple(answer) for answer in good[0]["result"]["token_ids"]) if good else (),
    )


def _loaded(run: Run) -> Mapping[str, float]:
    found: Mapping[str, float] = run["result"]["loaded"]
    return found


def _first(run: Run) -> Mapping[str, float]:
    found: Mapping[str, float] = run["result"]["steps"][0]
    return found


def _last(run: Run) -> Mapping[str, float]:
    found: Mapping[str, float] = run["result"]["steps"][-1]
    return found


def _decoded(run: Run, what: str) -> float:
    return _last(run)[what] - _first(run)[what]


def _decode(run: Run) -> float:
    return _decoded(run, "num_tokens") / _decoded(run, "seconds")
