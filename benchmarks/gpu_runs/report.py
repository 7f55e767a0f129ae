"""The runs as a table for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_runs.job import Decode

NAMES = {
    "ours:host": "dist-infer, host tier",
    "ours:nvme": "dist-infer, nvme tier",
    "accelerate:plain": "accelerate, cpu offload",
    "accelerate:pinned": "accelerate, cpu offload, weights pinned by hand",
    "zero:plain": "DeepSpeed ZeRO-Inference, cpu, pinned",
}


_LEGEND = (
    "of the limit: the bytes that moved, over the pinned copies measured just before and after in the same process "
    "(nvme tier: over the slower of these and raw O_DIRECT reads of the store). The first decode passes are left out"
)


def markdown(results: Mapping[str, Any]) -> str:
    """Facts, one row for each competitor and batch size, and what did not run with the reason."""
    facts, runs = results["facts"], results["runs"]
    lines = [
        f"{facts['device']}, driver {facts['driver']}, Python {facts['python']}; {facts['model']}; "
        f"`{facts['command']}`.",
        "",
        "| what | batch | tok/s | s a pass | moved a pass | rate | pinned copies | of the limit | × best peer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = [(key, decode) for key, run in runs.items() for decode in decodes(run)]
    for batch in sorted({decode.batch for _, decode in rows}):
        peers = [decode.tokens_per_s for key, decode in rows if decode.batch == batch and not key.startswith("ours")]
        lines += [_row(key, decode, max(peers, default=0.0)) for key, decode in rows if decode.batch == batch]
    lines += ["", f"{_LEGEND}. Versions: {_versions(runs)}.", *_agreement(rows), *_check(results.get("check") or {})]
    for key, run in runs.items():
        if "error" in run:
            lines.append(f"{NAMES.get(key, key)} did not run: {run['error'].splitlines()[-1]}.")
    return "\n".join(lines) + "\n"


def _check(check: Mapping[str, Any]) -> list[str]:
    if "equal" not in check:
        return []
    same = "equal to the bit" if all(check["equal"].values()) else f"NOT EQUAL: {check['equal']}"
    return [
        f"A small random model answers from the tiers {', '.join(check['equal'])}: {same}; "
        f"{100 * check['tokens_as_transformers']:.0f} % of the tokens come before one that differs from transformers'."
    ]


def _agreement(rows: Sequence[tuple[str, Decode]]) -> list[str]:
    """How many of the large model's tokens each has in common with the first; rounding makes some differ."""
    found: dict[str, list[bool]] = {}
    first: dict[int, list[list[int]]] = {}
    for key, decode in rows:
        ours = first.setdefault(decode.batch, decode.tokens)
        same = [a == b for x, y in zip(ours, decode.tokens, strict=True) for a, b in zip(x, y, strict=True)]
        found.setdefault(key, []).extend(same)
    shares = [f"{NAMES.get(key, key)} {100 * sum(same) / len(same):.0f} %" for key, same in found.items() if same]
    return [f"Tokens in common with the first row's: {', '.join(shares[1:])}."] if len(shares) > 1 else []


def decodes(run: Mapping[str, Any]) -> Sequence[Decode]:
    """A run's figures; none for one that failed."""
    return [Decode(**values) for values in run.get("decodes", ())]


def _row(key: str, decode: Decode, best_peer: float) -> str:
    limit = decode.limit_bytes_per_s
    of_limit = f"{100 * decode.bytes_per_s / limit:.1f} %" if limit else "–"
    link = f"{decode.link_bytes_per_s / 1e9:.1f} GB/s" if decode.link_bytes_per_s else "–"
    if decode.disk_bytes_per_s:
        link += f", disk {decode.disk_bytes_per_s / 1e9:.2f} GB/s"
    ratio = f"{decode.tokens_per_s / best_peer:.2f}" if best_peer and key.startswith("ours") else "–"
    cells = (
        NAMES.get(key, key),
        f"{decode.batch}",
        f"{decode.tokens_per_s:.2f}",
        f"{decode.seconds / decode.passes:.3f}",
        f"{decode.streamed_bytes / 1e9:.2f} GB",
        f"{decode.bytes_per_s / 1e9:.1f} GB/s",
        link,
        of_limit,
        ratio,
    )
    return f"| {' | '.join(cells)} |"


def _versions(runs: Mapping[str, Any]) -> str:
    found: dict[str, str] = {}
    for run in runs.values():
        found |= run.get("versions", {})
    return ", ".join(f"{package} {number}" for package, number in sorted(found.items()))
