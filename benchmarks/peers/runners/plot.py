"""The bars of docs/benchmarks.md: `python plot.py RESULTS.json OUT.svg`, in the environment `plot`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from peers.figures import Row, rows_of

_OURS, _PEER, _UNCAPPED = "#1f6f8b", "#c0b7a8", "#e3ddd2"


def bars(axis: plt.Axes, rows: list[Row], title: str) -> None:
    """One horizontal bar a competitor, with its lowest and highest round."""
    shown = [row for row in rows if row.decode is not None and row.decode_range is not None]
    names = [row.name + ("" if row.capped else " (no limit)") for row in shown]
    values = [row.decode or 0.0 for row in shown]
    ranges = [row.decode_range or (0.0, 0.0) for row in shown]
    errors = [
        [value - low for value, (low, _) in zip(values, ranges, strict=True)],
        [high - value for value, (_, high) in zip(values, ranges, strict=True)],
    ]
    colours = [_OURS if row.name.startswith("dist-infer") else _PEER if row.capped else _UNCAPPED for row in shown]
    places = range(len(shown))
    axis.barh(places, values, color=colours, xerr=errors, error_kw={"elinewidth": 0.8, "capsize": 2})
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlabel("decode tokens per second")
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    reach = max((high for _, high in ranges), default=1.0)
    axis.set_xlim(0, 1.15 * reach)
    for place, value, (_, high) in zip(places, values, ranges, strict=True):
        axis.text(high + 0.015 * reach, place, f"{value:.2f}", va="center", fontsize=8)


def main() -> None:
    document = json.loads(Path(sys.argv[1]).read_text())
    rows = rows_of(document)
    batches = [int(batch) for batch in document["work"]]
    groups = [[row for row in rows if row.batch == batch] for batch in batches]
    matplotlib.rcParams.update({"font.size": 9, "svg.hashsalt": "peers"})
    figure, axes = plt.subplots(
        len(batches),
        1,
        figsize=(8, 0.8 * len(batches) + 0.3 * sum(map(len, groups))),
        squeeze=False,
        gridspec_kw={"height_ratios": [max(1, len(group)) for group in groups]},
        layout="constrained",
    )
    memory = document["memory_bytes"] / 2**30
    size = document["model"]["num_bytes"] / 1e9
    for axis, batch, group in zip(axes[:, 0], batches, groups, strict=True):
        bars(axis, group, f"batch {batch}: {size:.1f} GB of bf16 weights in {memory:g} GiB of memory")
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
