"""The doctor before a launch: only problems are shown, and the first error ends it."""

from __future__ import annotations

from rich.console import Console

from dist_infer.config import RunConfig
from launch.doctor.examine import examine
from launch.doctor.report import problem_lines


def preflight(config: RunConfig, console: Console) -> None:
    """Raises the first error as the tree's, after all other problems were printed; warnings stop nothing."""
    report = examine(config)
    first = report.first_error
    for finding in report.problems:
        if finding is not first:
            for line in problem_lines(finding):
                console.print(line, markup=False)
    if first is not None:
        raise first.as_error()
