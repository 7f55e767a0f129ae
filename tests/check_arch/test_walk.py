"""Checks in processes of their own: one that dies or hangs is a finding, and leaves nothing behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from dist_infer.check_arch.layout import Layout, layouts_of
from dist_infer.check_arch.report import TypeReport
from dist_infer.check_arch.walk import WalkOptions, walk, walk_all
from launch.cli import app
from partition.errors import CheckpointError, ConfigError

RESIDENT = (Layout(tensor=1, pipeline=1, streamed=False),)


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def processes() -> list[str]:
    return [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]


@pytest.mark.slow
def test_a_check_that_dies_does_not_end_the_walk(own_temporary_directory: Path) -> None:
    """Guards the others' rows, and the temporary files of the dead one."""
    seen: list[str] = []
    options = WalkOptions(jobs=2)
    reports = walk(["/no/such/model", "llama"], RESIDENT, options, lambda report: seen.append(report.target))
    assert [(report.target, report.verdict) for report in reports] == [("/no/such/model", "failed"), ("llama", "equal")]
    assert "ended with code 1" in reports[0].remark
    assert "is no directory" in reports[0].problem
    assert sorted(seen) == ["/no/such/model", "llama"]
    assert list(own_temporary_directory.iterdir()) == []


@pytest.mark.slow
def test_a_check_out_of_memory_is_a_failure() -> None:
    """Guards the machine: a model class that allocates without end must not take all of it."""
    (report,) = walk(["llama"], RESIDENT, WalkOptions(memory_bytes=64 << 20), lambda report: None)
    assert report.verdict == "failed"


def test_a_check_that_hangs_is_ended(own_temporary_directory: Path) -> None:
    """Guards the deadline; no process and no file is left."""
    (report,) = walk(["llama"], RESIDENT, WalkOptions(deadline_s=0.05), lambda report: None)
    assert (report.verdict, report.failed) == ("failed", True)
    assert "not done within" in report.problem
    assert [line for line in processes() if "check_arch" in line] == []
    assert list(own_temporary_directory.iterdir()) == []


def test_an_error_of_the_caller_ends_what_runs() -> None:
    """Guards Ctrl-C while a report is shown: nothing goes on in the background."""

    def stop(report: TypeReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(["llama", "gpt2"], RESIDENT, WalkOptions(jobs=1, deadline_s=0.05), stop)
    assert [line for line in processes() if "check_arch" in line] == []


def test_types_with_one_text_part_are_checked_once() -> None:
    """Guards the time of --all: composite types are their text part, whose row they share."""
    checked: list[str] = []
    reports = walk_all(
        ["a", "a_text", "b"],
        RESIDENT,
        WalkOptions(deadline_s=0.01, jobs=2),
        lambda report: checked.append(report.target),
        lambda name: "a_text" if name.startswith("a") else name,
    )
    assert sorted(checked) == ["a_text", "b"]
    assert [(report.target, report.model_type) for report in reports] == [
        ("a", "a_text"),
        ("a_text", "a_text"),
        ("b", "b"),
    ]


@pytest.mark.slow
def test_the_command_prints_json_and_its_code() -> None:
    """Guards the verb from the command line to the verdict, two tensor ranks included."""
    done = CliRunner().invoke(app, ["check-arch", "llama", "--tensor", "2", "--pipeline", "1", "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["types"]
    assert found["verdict"] == "equal"
    assert len(found["layouts"]) == len(layouts_of((2,), (1,)))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["llama", "--all"],
        ["llama", "--write", "page.md"],
        ["llama", "--tensor", "9"],
        ["llama", "--pipeline", "0"],
        ["llama", "--jobs", "0"],
        ["llama", "--deadline", "0"],
        ["--all", "--write", "/no/such/folder/page.md"],
    ],
)
def test_senseless_options_are_refused(arguments: list[str]) -> None:
    """Guards against an option that does nothing, or an answer lost after a walk of minutes."""
    done = CliRunner().invoke(app, ["check-arch", *arguments])
    assert isinstance(done.exception, ConfigError), done.output


def test_a_name_that_is_nothing_starts_nothing() -> None:
    """Guards the message of a typing error: it comes at once."""
    done = CliRunner().invoke(app, ["check-arch", "lama"])
    assert isinstance(done.exception, CheckpointError)
    assert "nearest: llama" in str(done.exception)
