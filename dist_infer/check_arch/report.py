"""What a check found, as data, as a transcript and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from dist_infer.check_arch.layout import Layout
from dist_infer.check_arch.verdict import Verdict

_MOST_MESSAGE = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutReport:
    """One run. `error` is relative, None where nothing was compared; `message`: why it was refused or failed.

    `path`: the one in the model's spec, e.g. "packed"; empty where nothing ran.
    """

    layout: Layout
    verdict: Verdict
    path: str = ""
    error: float | None = None
    num_agreeing: int = 0
    num_positions: int = 0
    bytes_streamed: int = 0
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeReport:
    """One model type, or one model directory. `target`: what was asked; `model_type`: whose config was made tiny."""

    target: str
    model_type: str
    architecture: str = ""
    shape: str = ""
    kv_bytes_per_token: int | None = None
    layouts: tuple[LayoutReport, ...] = ()
    problem: str = ""  # why there is nothing to compare with, or what ended the check
    failed: bool = False  # the problem is one of the check or of ours, not of transformers
    refused: bool = False  # the problem is a refusal by name, before any layout
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Of all layouts: the worst of those that ran; refused when none did."""
        if self.problem:
            return "failed" if self.failed else "refused" if self.refused else "no-reference"
        found = {report.verdict for report in self.layouts}
        for worst in ("failed", "wrong", "equal"):
            if worst in found:
                return worst
        return "refused"

    @property
    def path(self) -> str:
        return next((report.path for report in self.layouts if report.path), "")

    @property
    def error(self) -> float | None:
        """The largest of all layouts."""
        errors = [report.error for report in self.layouts if report.error is not None]
        return max(errors, key=lambda error: (error != error, error)) if errors else None

    @property
    def equal(self) -> tuple[Layout, ...]:
        return tuple(report.layout for report in self.layouts if report.verdict == "equal")

    @property
    def remark(self) -> str:
        """The first message of the worst kind there is, in one line; of which layout, unless all say the same."""
        for verdict in ("failed", "wrong", "refused"):
            found = [report for report in self.layouts if report.verdict == verdict]
            if found:
                alike = len(found) == len(self.layouts) and len({report.message for report in found}) == 1
                return one_line(("" if alike else f"{found[0].layout}: ") + (found[0].message or verdict))
        return one_line(self.problem)


def one_line(message: str) -> str:
    """A message without line breaks, and not longer than people read."""
    flat = " ".join(message.split())
    return flat if len(flat) <= _MOST_MESSAGE else flat[: _MOST_MESSAGE - 2] + " …"


def transcript(report: TypeReport) -> Iterator[str]:
    """At most 15 lines for people, unless more layouts than usual were asked for."""
    name = report.target if report.target == report.model_type else f"{report.target} ({report.model_type})"
    kv = "" if report.kv_bytes_per_token is None else f", {report.kv_bytes_per_token:,} bytes of KV per token (fp32)"
    yield f"{name}: {report.architecture or 'no model'}{f', {report.path} path' if report.path else ''}{kv}"
    if report.shape:
        yield f"  tiny: {report.shape}"
    messages: dict[str, int] = {}
    for each in report.layouts:
        yield f"  {each.layout!s:<18} {_outcome(each, messages)}"
    for message, number in messages.items():
        yield f"  [{number}] {message}"
    if report.problem:
        yield f"  {one_line(report.problem)}"
    yield f"  {report.verdict}, {report.seconds:.0f} s"


def _outcome(each: LayoutReport, messages: dict[str, int]) -> str:
    if each.error is not None:
        streamed = f", {each.bytes_streamed:,} bytes streamed" if each.bytes_streamed else ""
        tokens = f"{each.num_agreeing} of {each.num_positions} greedy tokens"
        return f"{each.verdict:<8} relative error {each.error:.1e}, {tokens}{streamed}"
    number = messages.setdefault(one_line(each.message), len(messages) + 1)
    return f"{each.verdict:<8} [{number}]"


_reports: TypeAdapter[TypeReport] = TypeAdapter(TypeReport)


def to_json(report: TypeReport) -> bytes:
    return json.dumps(asdict(report)).encode()  # an error that is no number stays one


def from_json(data: bytes) -> TypeReport:
    """Raises pydantic.ValidationError when the bytes are not one."""
    return _reports.validate_json(data)


def document(reports: Sequence[TypeReport]) -> str:
    """JSON for scripts: the reports with what follows from them, and how many there are of each verdict."""
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for report in reports:
        counts[report.verdict] = counts.get(report.verdict, 0) + 1
        derived = {"verdict": report.verdict, "path": report.path, "error": report.error, "remark": report.remark}
        rows.append(_finite({**asdict(report), **derived}))
    return json.dumps({"counts": counts, "types": rows}, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: they become texts."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
