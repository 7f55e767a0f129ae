"""The text for docs/benchmarks.md, from a results file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peers.figures import Row, agreement, rows_of
from peers.goals import OURS, verdicts

_GIB = 2**30
_COLUMNS = (
    "",
    "weights",
    "decode tok/s",
    "× best bf16 peer",
    "× best peer",
    "with prefill tok/s",
    "load s",
    "prefill s",
    "start to first token s",
    "GB a step",
    "GB/s",
    "of raw disk",
    "peak GiB",
    "RSS GiB",
    "CPU s",
    "same tokens",
)
_REACHED = {True: "yes", False: "**no**", None: "–"}


def markdown(document: Mapping[str, Any]) -> str:
    """Facts, a table a batch, the goals, packing, versions."""
    rows = rows_of(document)
    parts = ["## Beside accelerate, DeepSpeed ZeRO-Inference and llama.cpp", _facts(document)]
    for batch, work in document["work"].items():
        mine = [row for row in rows if row.batch == int(batch)]
        parts += [
            f"### Batch {batch}: prompt {work['prompt_tokens']}, {work['new_tokens']} new tokens, greedy",
            _table(mine),
        ]
    parts += ["### What it was to reach", _goals(document, rows), "### Versions", _versions(document)]
    return "\n\n".join(parts) + "\n"


def _facts(document: Mapping[str, Any]) -> str:
    machine, model = document["machine"], document["model"]
    vector = ", ".join(machine["vector_units"]) or "none of note"
    raw = [rate for run in document["runs"] for rate in (run["raw_before"], run["raw_after"])]
    disk = f"{min(raw) / 1e9:.2f}–{max(raw) / 1e9:.2f} GB/s" if raw else "not measured"
    cold = all(run["cold"] for run in document["runs"])
    return "\n".join(
        (
            f"- Machine: {machine['processor']}, {machine['cores']} cores ({vector}), "
            f"{machine['memory_bytes'] / _GIB:.0f} GiB of memory, Linux {machine['kernel']}, disk {machine['disk']} "
            f"with {disk} of O_DIRECT reads over the measurement.",
            f"- Model: Llama, random weights, {model['layers']} layers, hidden {model['hidden']}, intermediate "
            f"{model['intermediate']}, {model['heads']} heads, {model['kv_heads']} KV heads, vocabulary "
            f"{model['vocab']}: {model['num_bytes'] / 1e9:.2f} GB in bf16.",
            f"- Each run alone in a memory cgroup of {document['memory_bytes'] / _GIB:.2f} GiB (page cache included), "
            f"{document['threads']} compute threads, page cache {'dropped' if cold else 'NOT dropped'} before it. "
            "Medians of the rounds; lowest and highest in brackets.",
            f"- Command: `{document['command']}`, {document['started']}, revision {document['revision']}.",
        )
    )


def _table(rows: Sequence[Row]) -> str:
    peers = [row for row in rows if row.capped and row.decode is not None and not row.name.startswith(OURS)]
    best = max((row.decode or 0.0 for row in peers), default=0.0)
    best_bf16 = max((row.decode or 0.0 for row in peers if row.weights == "bf16"), default=0.0)
    reference = next((row for row in rows if row.weights == "bf16" and row.tokens), None)
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| --- " * len(_COLUMNS) + "|"]
    for row in rows:
        name = row.name if row.capped else f"{row.name} (no limit)"
        if row.decode is None or row.decode_range is None:
            lines.append(f"| {name} | {row.weights} | {row.ended} |" + " – |" * (len(_COLUMNS) - 3))
            continue
        share = None if not row.read_rate or not row.raw_rate else 100 * row.read_rate / row.raw_rate
        same = None if reference is None else agreement(row, reference)
        cells = [
            name,
            row.weights,
            f"{row.decode:.2f} ({row.decode_range[0]:.2f}–{row.decode_range[1]:.2f})",
            f"{row.decode / best_bf16:.2f}" if best_bf16 else "–",
            f"{row.decode / best:.2f}" if best else "–",
            _cell(row.whole),
            _cell(row.load_s, "{:.1f}"),
            _cell(row.prefill_s),
            _cell(row.first_token_s, "{:.1f}"),
            _cell(row.step_bytes, scale=1e9),
            _cell(row.read_rate, scale=1e9),
            _cell(share, "{:.0f} %"),
            _cell(row.peak_bytes, scale=_GIB),
            _cell(row.rss_bytes, scale=_GIB),
            _cell(row.cpu_s, "{:.0f}"),
            _cell(None if same is None else 100 * same, "{:.0f} %"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if reference is not None:
        lines.append(f"\n`same tokens`: share of an answer before its first difference from {reference.name}.")
    return "\n".join(lines)


def _cell(value: float | None, form: str = "{:.2f}", *, scale: float = 1.0) -> str:
    return "–" if value is None else form.format(value / scale)


def _goals(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    lines = ["| goal | measured | reached |", "| --- | --- | --- |"]
    lines += [f"| {v.goal} | {v.figure} | {_REACHED[v.reached]} |" for v in verdicts(document, rows)]
    return "\n".join(lines)


def _versions(document: Mapping[str, Any]) -> str:
    found: dict[str, dict[str, str]] = {}
    for run in document["runs"]:
        if run["ended"] == "ok":
            found.setdefault(run["competitor"].split(",")[0].split(" ")[0], {}).update(run["result"]["versions"])
    lines = [f"- dist-infer computes with {document['kernels'].partition(' (')[0]}"] if document["kernels"] else []
    lines += [
        f"- {name}: " + ", ".join(f"{package} {number}" for package, number in sorted(versions.items()))
        for name, versions in found.items()
    ]
    return "\n".join(lines)
