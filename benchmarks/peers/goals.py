"""What the comparison is to show, each goal with the figure that decides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers.figures import Row

OURS = "dist-infer"
_MOST_START_S = 10.0  # from process start to first token, beside one pass


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """goal: in words, with its threshold. reached: None where something that decides it was not measured."""

    goal: str
    figure: str
    reached: bool | None


def verdicts(document: Mapping[str, Any], rows: Sequence[Row]) -> list[Verdict]:
    return [
        _ratio("batch 1, bf16: at least 2.2 × the best bf16 peer", 2.2, _ours(rows, "bf16", 1), _best(rows, "bf16", 1)),
        _ratio(
            "batch 32, bf16: at least 2.5 × accelerate",
            2.5,
            _ours(rows, "bf16", 32),
            _best(rows, "bf16", 32, "accelerate"),
        ),
        _ratio("batch 1, int8: at least 4 × the best bf16 peer", 4.0, _ours(rows, "int8", 1), _best(rows, "bf16", 1)),
        _ratio(
            "batch 1, int4: at least 1.2 × llama.cpp Q4_0 in RAM",
            1.2,
            _ours(rows, "int4", 1),
            _best(rows, "q4_0", 1, "llama.cpp in RAM", capped=False),
        ),
        _ratio(
            "batch 32, int4: at least 4 × accelerate in bf16",
            4.0,
            _ours(rows, "int4", 32),
            _best(rows, "bf16", 32, "accelerate"),
        ),
        *_starts(rows),
        *_packs(document),
        *_ceilings(document),
    ]


def _ours(rows: Sequence[Row], weights: str, batch: int) -> Row | None:
    return _best(rows, weights, batch, OURS)


def _best(rows: Sequence[Row], weights: str, batch: int, name: str = "", *, capped: bool = True) -> Row | None:
    """The fastest of the competitors whose name begins so; without a name, of all peers."""
    found = [
        row
        for row in rows
        if row.decode is not None
        and (row.weights, row.batch, row.capped) == (weights, batch, capped)
        and (row.name.startswith(name) if name else not row.name.startswith(OURS))
    ]
    return max(found, key=lambda row: row.decode or 0.0, default=None)


def _ratio(goal: str, least: float, ours: Row | None, peer: Row | None) -> Verdict:
    if ours is None or peer is None or not ours.decode or not peer.decode:
        return Verdict(goal=goal, figure="not measured", reached=None)
    ratio = ours.decode / peer.decode
    figure = f"{ratio:.2f} × ({ours.decode:.2f} against {peer.decode:.2f} tok/s, {peer.name})"
    return Verdict(goal=goal, figure=figure, reached=ratio >= least)


def _starts(rows: Sequence[Row]) -> list[Verdict]:
    """One pass is what a step of batch 1 takes."""
    found = []
    for row in rows:
        if not row.name.startswith(OURS) or row.batch != 1 or row.first_token_s is None or not row.decode:
            continue
        allowed = _MOST_START_S + 1 / row.decode
        found.append(
            Verdict(
                goal=f"{row.name}: process start to first token in at most {_MOST_START_S:g} s and one pass",
                figure=f"{row.first_token_s:.1f} s of {allowed:.1f} s",
                reached=row.first_token_s <= allowed,
            )
        )
    return found


def _packs(document: Mapping[str, Any]) -> list[Verdict]:
    """Both directions count: a pack reads the whole checkpoint and writes the store, on one disk."""
    found = []
    for pack in document["packs"]:
        if pack["ended"] != "ok":
            found.append(Verdict(goal=f"{pack['competitor']}: packs", figure=pack["ended"], reached=False))
            continue
        made = pack["result"]["pack"]
        rate = max(document["model"]["num_bytes"], made["bytes_written"]) / made["seconds"]
        read = max(pack["raw_before"], pack["raw_after"])
        slower = min(read, pack["write_rate"])
        found.append(
            Verdict(
                goal=f"{pack['competitor']}: packs at 60 % of the slower of reading and writing, or more",
                figure=f"{rate / 1e9:.2f} GB/s = {100 * rate / slower:.0f} % (read {read / 1e9:.2f}, write "
                f"{pack['write_rate'] / 1e9:.2f} GB/s; {made['seconds']:.1f} s)",
                reached=rate >= 0.6 * slower,
            )
        )
    return found


def _ceilings(document: Mapping[str, Any]) -> list[Verdict]:
    capped = [
        run
        for run in [*document["packs"], *document["runs"]]
        if run["competitor"].startswith(OURS) and run["limit_bytes"] is not None
    ]
    if not capped:
        return []
    peak = max(run["peak_bytes"] or 0 for run in capped)
    killed = sum(run["ended"] == "killed" for run in capped)
    limit = capped[0]["limit_bytes"]
    return [
        Verdict(
            goal="the process tree stays within the group",
            figure=f"{peak / 2**30:.2f} of {limit / 2**30:.2f} GiB at most, {killed} of {len(capped)} runs killed",
            reached=killed == 0 and peak <= limit,
        )
    ]
