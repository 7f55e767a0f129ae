"""What a finding must say, and what becomes of all of them: exit code, order, JSON, the error of a launch."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from launch.doctor.finding import error, ok, refused, warning
from launch.doctor.report import Report, problem_lines, report_table, report_title
from partition.errors import BudgetError, CheckpointError, StoreError, WorkerError

FULL = error("disk", "b", "8 GiB more are needed", why="packing ends", do="free some", kind="store")
LATE = warning("clock", "a", "3 s ahead", why="logs do not fit", do="run NTP")


def test_a_problem_without_a_way_out_is_our_bug() -> None:
    """The issue: every finding says what, where, why it matters, what to do."""
    with pytest.raises(ValueError, match="without a reason"):
        warning("disk", "a", "it is slow", why="", do="buy another")
    with pytest.raises(ValueError, match="a way out"):
        error("disk", "a", "it is slow", why="it is", do="")


def test_the_exit_code_is_that_of_the_first_error() -> None:
    taken = error("ports", "a", "taken", why="nobody reaches it", do="choose another", kind="config")
    assert Report(findings=(LATE, ok("limits", "a", "many")), seconds=1).exit_code == 0
    assert Report(findings=(LATE, FULL, taken), seconds=1).exit_code == 3
    assert Report(findings=(taken, FULL), seconds=1).exit_code == 2
    assert error("network", "a", "no way", why="w", do="d").exit_code == 4


@pytest.mark.parametrize(
    ("caught", "code"),
    [(BudgetError("x"), 2), (CheckpointError("x"), 3), (StoreError("x"), 3), (WorkerError("x", rank=1), 4)],
)
def test_what_another_part_refuses_keeps_its_words_and_its_code(caught: Exception, code: int) -> None:
    """A launch that preflight ends says the same, with the same code, as one that ran into it."""
    finding = refused("memory", caught, why="w")  # type: ignore[arg-type]
    assert finding.exit_code == code
    assert str(finding.as_error()) == "x"
    assert finding.as_error().exit_code == code


def test_a_launch_that_is_ended_is_told_where_and_what_to_do() -> None:
    assert str(FULL.as_error()) == "b: 8 GiB more are needed: free some"
    assert isinstance(FULL.as_error(), StoreError)
    assert problem_lines(LATE) == ["warning: clock: a: 3 s ahead", "  why: logs do not fit", "  do: run NTP"]


def test_problems_end_with_the_errors_and_json_has_every_field() -> None:
    report = Report(findings=(FULL, ok("limits", "a", "many"), LATE), seconds=1.23456)
    assert report.problems == (LATE, FULL)
    assert report_title(report) == "doctor: 1 error, 1 warning, 1 ok, in 1.2 s"
    document = json.loads(json.dumps(report.as_dict()))
    assert (document["exit_code"], document["seconds"]) == (3, 1.235)
    assert document["findings"][0] == {
        "severity": "error",
        "check": "disk",
        "what": "8 GiB more are needed",
        "where": "b",
        "why": "packing ends",
        "do": "free some",
        "kind": "store",
    }


def test_people_see_why_and_what_to_do_beside_each_problem() -> None:
    """Also where names hold what a markup language would take for its own."""
    seen = Console(width=120, record=True, file=io.StringIO())
    odd = ok("disk", "[red]node[/red]", "[bold]")
    seen.print(report_table([FULL, odd], "doctor"))
    text = seen.export_text()
    for words in ("error", "8 GiB more are needed", "why: packing ends", "do: free some", "[red]node[/red]", "[bold]"):
        assert words in text
