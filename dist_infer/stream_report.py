"""The streaming benchmark as one HTML page: figures, where the time goes, and the last passes as timelines.

Self-contained: style and drawings are in the page, and nothing is fetched. It follows the reader's light or dark mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dist_infer.stream_bench import StreamBatch, StreamBench
from dist_infer.stream_figures import RankPasses
from dist_infer.stream_picture import lanes_picture, shares_picture

_STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1d2329;--soft:#5b6670;--line:#dfe3e6;--track:#f1f3f4;
--read:#8db8f2;--wait:#f0a35c;--compute:#83c99a;--verify:#c3a6e8;--copy:#7fcfd6;--rest:#d5d9dc;--on:#10161c}
@media (prefers-color-scheme:dark){:root{--page:#14181c;--card:#1b2126;--ink:#e6eaed;--soft:#98a4ae;--line:#323a41;
--track:#232a30;--read:#4f86cf;--wait:#c9772c;--compute:#469663;--verify:#8465b5;--copy:#378f98;--rest:#48525a;--on:#fff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 8px}
h3{font-size:14px;margin:14px 0 4px;color:var(--soft)}
p{max-width:78ch}.facts{color:var(--soft);margin:0 0 18px}
.verdict{border-left:4px solid var(--compute);background:var(--card);padding:10px 16px;margin:0 0 10px;max-width:none}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 16px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:13px;vertical-align:bottom}
tr:last-child td{border-bottom:0}th:first-child,td:first-child{text-align:left}
td small{display:block;color:var(--soft);font-size:12px}
.lanes{display:flex}.scroll{overflow-x:auto;flex:1}svg{display:block;flex:none}
.key{display:inline-block;width:12px;height:12px;border-radius:3px;margin:0 3px 0 2px;vertical-align:-1px}
text{font:11px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}
text.axis{fill:var(--soft)}
text.lane{font-size:12px;fill:var(--soft)}
text.unit{fill:var(--on);pointer-events:none}
text.passname{font-weight:600}
line.grid{stroke:var(--line)}
line.pass{stroke:var(--ink);stroke-dasharray:3 3;opacity:.6}
rect.track{fill:var(--track)}
rect.read,.key.read{fill:var(--read);background:var(--read)}
rect.wait,.key.wait{fill:var(--wait);background:var(--wait)}
rect.compute,.key.compute{fill:var(--compute);background:var(--compute)}
rect.verify,.key.verify{fill:var(--verify);background:var(--verify)}
rect.copy,.key.copy{fill:var(--copy);background:var(--copy)}
rect.rest,.key.rest{fill:var(--rest);background:var(--rest)}
g>rect{stroke:var(--card);stroke-width:.7}
g:hover>rect{stroke:var(--ink)}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft)}details table{width:auto;margin-top:6px}
"""
_LEGEND = (
    "<p>How to read it: time runs to the right; a dashed line is the begin of a pass. Each slot of the streamer has a "
    'lane of its <span class="key read"></span>reads: a box is one unit on its way from the disk, named in it. Below '
    'them the computing thread is either <span class="key wait"></span>stalled, because the unit in turn is not read '
    'yet, or <span class="key compute"></span>computing the unit named in the box; '
    '<span class="key verify"></span>checksums and <span class="key copy"></span>copies to a device have lanes where '
    "there are any. Streaming is at the disk's limit when the reads leave no gap, also across the dashed lines: the "
    "first units of the next pass are then read while the last ones of this pass are computed. Gaps between reads "
    "while something computes mean that the slots were full, so computing sets the pace. Point at a box for its "
    "figures.</p>"
)
_COLUMNS = (
    ("batch", "requests decoded together"),
    ("tok/s", "output tokens per second"),
    ("s per pass", "from the end of a pass to the end of the next"),
    ("MB per pass", "read from disk"),
    ("GB/s", "streamed"),
    ("raw GB/s", "O_DIRECT reads around it"),
    ("% of raw", "median of the rounds"),
    ("stalled s", "per pass"),
    ("computing s", "per pass"),
    ("exposed s", "of a pass, neither reading at the raw rate nor computing"),
    ("predicted tok/s", "the plan's cost model"),
    ("of predicted", "achieved"),
    ("bound by", "most of a pass goes to"),
)


def stream_report(bench: StreamBench) -> str:
    """The page, as text."""
    streamed = bench.planned_bytes_per_pass / bench.total_bytes
    where = f"{bench.num_ranks} rank{'s' if bench.num_ranks > 1 else ''} on {bench.device}"
    facts = (
        f"{bench.model_type}, {bench.dtype}, {bench.total_bytes / 1e9:.2f} GB of weights, {100 * streamed:.0f} % "
        f"of them streamed in every pass; {where}, reader {bench.reader}; prompts of "
        f"{bench.prompt_tokens} and answers of {bench.new_tokens} tokens; {bench.host}"
    )
    batches = [(each.batch, each.median) for each in bench.batches]
    body = [
        f"<h1>Streamed decoding</h1><p class='facts'>{escape(facts)}</p>",
        *(f"<p class='verdict'><b>Batch {each.batch}</b> is {escape(each.verdict)}.</p>" for each in bench.batches),
        f"<h2>Figures</h2><div class='card'>{_table(bench.batches)}{_raw(bench)}</div>",
        "<h2>Where the time of a pass goes</h2>"
        "<p>Upper bar: what the disk needs for a pass's bytes at its raw rate. Lower bar: what the busiest process did "
        'meanwhile: <span class="key compute"></span>computing, <span class="key copy"></span>waiting for other ranks, '
        '<span class="key wait"></span>waiting for units, <span class="key rest"></span>between passes.</p>'
        f"<div class='card'>{shares_picture(batches)}</div>",
        f"<h2>The last passes</h2>{_LEGEND}",
    ]
    for batch, ranks in bench.pictures:
        body.append(f"<h2>Batch {batch}</h2>")
        body += [_rank(rank) for rank in ranks]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>Streamed decoding: {escape(bench.model_type)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _rank(rank: RankPasses) -> str:
    return f"<h3>rank {rank.rank}</h3><div class='card'>{lanes_picture(rank)}</div>"


def _table(batches: Sequence[StreamBatch]) -> str:
    head = "".join(f"<th title='{escape(tip)}'>{escape(name)}</th>" for name, tip in _COLUMNS)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(each))}</tr>" for each in batches)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cells(each: StreamBatch) -> list[str]:
    found = each.median
    spread = [one.percent_of_raw for one in each.rounds if one.percent_of_raw is not None]
    percent = "–" if found.percent_of_raw is None else f"{found.percent_of_raw:.1f} %"
    if len(spread) > 1:
        percent += f"<small>{min(spread):.0f} to {max(spread):.0f}</small>"
    return [
        str(each.batch),
        f"{found.tokens_per_s:.2f}",
        f"{found.seconds_per_pass:.3f}",
        f"{found.bytes_per_pass / 1e6:.1f}",
        f"{found.bytes_per_s / 1e9:.3f}",
        f"{found.raw_bytes_per_s / 1e9:.3f}",
        percent,
        f"{found.stall_s:.3f}",
        f"{found.compute_s:.3f}",
        f"{found.exposed_s:.3f}",
        f"{each.predicted_tokens_per_s:.2f}",
        f"{100 * each.achieved_of_predicted:.0f} %",
        escape(each.bound_by),
    ]


def _raw(bench: StreamBench) -> str:
    """How the raw rate was found, folded away."""
    rows = "".join(
        f"<tr><td>{escape(rate.setting.name)}</td><td>{rate.bytes_per_s / 1e9:.3f} GB/s</td></tr>"
        for rate in bench.raw_sweep
    )
    rates, in_cache = (
        ", ".join(f"{rate.bytes_per_s / 1e9:.3f}" for rate in found) for found in (bench.raw, bench.raw_in_cache)
    )
    note = "" if bench.raw_is_direct else " The file system refuses O_DIRECT: these reads went through the page cache."
    others = "".join(
        f" {escape(name)}: {rate / 1e9:.3f} GB/s, measured at the start." for name, rate in bench.raw_assumed.items()
    )
    return (
        f"<details><summary>raw reads: {len(bench.raw_sweep)} settings, then {len(bench.raw)} measurements between the "
        f"rounds</summary><table>{rows}</table><p>Between the rounds, in order: {rates} GB/s; "
        f"into the same few buffers, which stay in the processor's cache: {in_cache} GB/s.{note}{others}</p>"
        "</details>"
    )
