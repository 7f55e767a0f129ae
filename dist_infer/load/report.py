"""A load as one HTML page: figures, distributions, and the run over time.

Self-contained: style and drawings are in the page, and nothing is fetched. It follows the reader's light or dark mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dist_infer.load.figures import LoadFigures, Spread
from dist_infer.load.plots import distribution_picture, in_flight_picture, rate_picture, ttft_picture
from dist_infer.load.run import Measured

_STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1d2329;--soft:#5b6670;--line:#dfe3e6;
--one:#2f6fb7;--two:#2c8a52;--three:#7c56b5;--bad:#c1442e;--mark:#b06a1c}
@media (prefers-color-scheme:dark){:root{--page:#14181c;--card:#1b2126;--ink:#e6eaed;--soft:#98a4ae;--line:#323a41;
--one:#7ab0ee;--two:#6cc58f;--three:#b497e6;--bad:#f0806c;--mark:#e2a45c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1140px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:34px 0 8px}
p{max-width:78ch}.facts{color:var(--soft);margin:0 0 18px;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 16px;overflow-x:auto;
margin:0 0 12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:0 0 12px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.tile b{display:block;font-size:22px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:13px}tr:last-child td{border-bottom:0}
th:first-child,td:first-child{text-align:left}
svg{display:block;width:100%;min-width:640px;height:auto}
text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}text.axis{fill:var(--soft)}
line.grid{stroke:var(--line)}line.mark{stroke:var(--mark);stroke-dasharray:4 3}
polyline{fill:none;stroke-width:2}polyline.one{stroke:var(--one)}polyline.two{stroke:var(--two)}
polyline.three{stroke:var(--three)}circle.dot{fill:var(--one);opacity:.7}circle.bad{fill:var(--bad)}
"""
_NAMES = {
    "ttft": ("time to first token", "from when a request was due"),
    "tpot": ("time per output token", "of a request, behind its first token"),
    "itl": ("between two pieces", "of a stream, over all requests"),
    "e2e": ("whole request", "from when it was due"),
    "late": ("sent late", "how far the client itself was behind"),
}


def load_report(measured: Measured, figures: LoadFigures, facts: Sequence[str]) -> str:
    """The page, as text. facts: what was measured and how, one sentence each."""
    done = [record for record in measured.records if record.error is None]
    values: dict[str, list[float]] = {
        "ttft": [record.ttft_s for record in done if record.ttft_s is not None],
        "tpot": [record.tpot_s for record in done if record.tpot_s is not None],
        "itl": [gap for record in done for gap in record.gaps_s()],
        "e2e": [record.e2e_s for record in done],
    }
    body = [
        "<h1>Load on an endpoint</h1>",
        f"<p class='facts'>{escape('; '.join(facts))}</p>",
        f"<div class='tiles'>{_tiles(figures)}</div>",
        f"<h2>Latencies</h2><div class='card'>{_table(figures)}</div>",
        _errors(figures),
        "<h2>Over the run</h2>",
        _card(
            "Time to first token, by when a request was due (failed requests at the bottom, in red)",
            ttft_picture(measured.records),
        ),
        _card("Pieces of answers a second", rate_picture(measured.records, measured.seconds)),
        _card("Open requests", in_flight_picture(measured.records)),
        "<h2>Distributions</h2><p>How many percent of the values are below a time.</p>",
        *(
            _card(f"{_NAMES[name][0]}, {_NAMES[name][1]}", distribution_picture(_NAMES[name][0], found))
            for name, found in values.items()
            if found
        ),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>Load on an endpoint</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _card(words: str, picture: str) -> str:
    return f"<div class='card'><span>{escape(words)}</span>{picture}</div>"


def _tiles(figures: LoadFigures) -> str:
    tiles = [
        (f"{figures.num_completed} of {figures.num_requests}", "requests completed"),
        (f"{figures.requests_per_s:.2f}", "requests a second"),
        (f"{figures.output_tokens_per_s:.1f}", "output tokens a second"),
        (f"{figures.peak_in_flight}", "open requests at most"),
        (f"{figures.seconds:.1f} s", "from the start to the last end"),
    ]
    if figures.total_tokens_per_s is not None:
        tiles.insert(3, (f"{figures.total_tokens_per_s:.1f}", "prompt and output tokens a second"))
    if figures.goodput_per_s is not None and figures.good_share is not None:
        limits = ", ".join(f"{name} ≤ {1e3 * value:g} ms" for name, value in figures.slo_s.items())
        tiles.append(
            (f"{figures.goodput_per_s:.2f}", f"good requests a second ({100 * figures.good_share:.0f} %): {limits}")
        )
    return "".join(
        f"<div class='tile'><b>{escape(value)}</b><span>{escape(words)}</span></div>" for value, words in tiles
    )


def _table(figures: LoadFigures) -> str:
    rows = []
    for name, (words, tip) in _NAMES.items():
        found: Spread | None = getattr(figures, name)
        if found is not None:
            cells = (found.mean, found.median, found.p90, found.p99, found.highest)
            shown = "".join(f"<td>{1e3 * value:.2f}</td>" for value in cells)
            rows.append(f"<tr><td>{escape(words)}, {escape(tip)}</td>{shown}</tr>")
    head = "".join(f"<th>{each}</th>" for each in ("milliseconds", "mean", "median", "p90", "p99", "highest"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _errors(figures: LoadFigures) -> str:
    if not figures.errors:
        return ""
    rows = "".join(f"<tr><td>{escape(kind)}</td><td>{count}</td></tr>" for kind, count in figures.errors.items())
    return f"<h2>Errors</h2><div class='card'><table><tr><th>kind</th><th>requests</th></tr>{rows}</table></div>"
