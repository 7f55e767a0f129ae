"""All findings of one look: as a table for people, as JSON for programs, and the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from launch.doctor.finding import Finding, Severity

_STYLES: dict[Severity, str] = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """`findings` in the order of their checks; `seconds`: what the look took."""

    findings: tuple[Finding, ...]
    seconds: float

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Warnings and errors, errors last: what matters most is read where the output ends."""
        found = [finding for finding in self.findings if finding.is_problem]
        return tuple(sorted(found, key=lambda finding: finding.severity == "error"))

    @property
    def first_error(self) -> Finding | None:
        return next((finding for finding in self.findings if finding.severity == "error"), None)

    @property
    def exit_code(self) -> int:
        """0 where there is no error, else that of the first error's kind."""
        return 0 if self.first_error is None else self.first_error.exit_code

    def as_dict(self) -> dict[str, Any]:
        return {
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 3),
            "findings": [asdict(finding) for finding in self.findings],
        }


def report_table(findings: Sequence[Finding], title: str) -> Table:
    table = Table(title=title)
    for name in ("", "check", "where", "what"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        words = Text(finding.what)
        if finding.is_problem:
            words.append(f"\nwhy: {finding.why}\ndo: {finding.do}", style="dim")
        table.add_row(
            Text(finding.severity, style=_STYLES[finding.severity]), finding.check, Text(finding.where), words
        )
    return table


def report_title(report: Report) -> str:
    counts = {kind: sum(finding.severity == kind for finding in report.findings) for kind in _STYLES}
    return (
        f"doctor: {_counted(counts['error'], 'error')}, {_counted(counts['warning'], 'warning')}, {counts['ok']} ok, "
        f"in {report.seconds:.1f} s"
    )


def problem_lines(finding: Finding) -> list[str]:
    """A problem as a launch shows it."""
    where = f"{finding.where}: " if finding.where else ""
    return [
        f"{finding.severity}: {finding.check}: {where}{finding.what}",
        f"  why: {finding.why}",
        f"  do: {finding.do}",
    ]


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
