"""docs/models.md from the reports of all types, and back: which rows a page has."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from dist_infer.check_arch.report import TypeReport
from dist_infer.check_arch.verdict import TOLERANCE

_HEAD = """\
# Model types

<!-- Written by `dist-infer check-arch --all --write docs/models.md`; not by hand. -->

Every causal model type of transformers {version}, checked on a tiny random model of the type: the cut, paged and
streamed path of dist-infer against transformers' eager forward in float32, over chunked prompts and ragged decoding.
[check-arch.md](check-arch.md) says how, and what the columns mean. `dist-infer check-arch TYPE` repeats a row.

{counts}

| type | architecture | verdict | path | TP | PP | streamed | KV bytes/token | rel. error | remark |
| --- | --- | --- | --- | --- | --- | --- | ---: | ---: | --- |
"""
_MOST_REMARK = 200
_ORDER = ("equal", "wrong", "failed", "refused", "no-reference")
_MEANING = {
    "equal": f"relative error at most {TOLERANCE:g} and the same greedy tokens in every layout that is not refused",
    "wrong": "numbers that differ, so a run of it is refused by name",
    "failed": "an error on the way, so a run of it is refused by name",
    "refused": "refused by name, before a byte is loaded",
    "no-reference": "transformers itself builds or runs no tiny causal model of it",
}


def render(reports: Sequence[TypeReport], version: str) -> str:
    """The page; version: of transformers. Sorted by type."""
    counts = {verdict: [r for r in reports if r.verdict == verdict] for verdict in _ORDER}
    lines = [f"{len(reports)} types:", ""]
    for verdict, found in counts.items():
        if not found:
            continue
        paths = Counter(report.path for report in found if report.path)
        split = f" ({', '.join(f'{number} {path}' for path, number in paths.most_common())})" if paths else ""
        lines.append(f"- **{len(found)} {verdict}**{split}: {_MEANING[verdict]}")
    table = [_row(report) for report in sorted(reports, key=lambda report: report.target)]
    return _HEAD.format(version=version, counts="\n".join(lines)) + "\n".join(table) + "\n"


def rows_of(page: str) -> dict[str, tuple[str, str]]:
    """type -> (verdict, path) of a page, for a test that compares without digits."""
    found = re.findall(r"^\| `([^`]+)` \| [^|]* \| ([^|]+) \| ([^|]*) \|", page, re.MULTILINE)
    return {name: (verdict.strip(), path.strip()) for name, verdict, path in found}


def row_of(report: TypeReport) -> tuple[str, str]:
    """What `rows_of` has to say about this report's type."""
    return report.verdict, report.path or "–"


def checked_types(reports: Sequence[TypeReport]) -> str:
    """JSON: the types that were found equal, with their path, as dist_infer/model/checked_types.json has them."""
    types = {report.model_type: report.path for report in reports if report.verdict == "equal"}
    return json.dumps({"types": dict(sorted(types.items()))}, indent=1) + "\n"


def _row(report: TypeReport) -> str:
    equal = report.equal
    verdict, path = row_of(report)
    cells = (
        f"`{report.target}`",
        report.architecture or "–",
        verdict,
        path,
        _numbers(layout.tensor for layout in equal),
        _numbers(layout.pipeline for layout in equal),
        "yes" if any(layout.streamed for layout in equal) else "–",
        "–" if report.kv_bytes_per_token is None else f"{report.kv_bytes_per_token:,}",
        "–" if report.error is None else f"{report.error:.0e}",
        _remark(report),
    )
    return "| " + " | ".join(cells) + " |"


def _numbers(values: object) -> str:
    return ", ".join(str(value) for value in sorted(set(values))) or "–"  # type: ignore[call-overload]


def _remark(report: TypeReport) -> str:
    words = report.remark.replace("|", "\\|").replace("<", "&lt;")
    words = words if len(words) <= _MOST_REMARK else words[: _MOST_REMARK - 2] + " …"
    if report.target != report.model_type and not report.problem:
        words = f"its text part, {report.model_type}" + (f"; {words}" if words else "")
    return words
