"""docs/reliability.md has every case that is tested, and none that is not."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# FAULTS that need a launched system and are injected into one, here or in tests that the page names
WANTED = {"T01", "T03", "T04", "T05", "T06", "T07", "T08", "T09", "T10", "T22", "T25", "T26", "T27", "T28", "T29"}
WANTED |= {"T31", "T32", "T35", "T36", "random"}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "reliability.py"))


@pytest.fixture(scope="module")
def tests(script: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = script["own_tests"]() | script["ELSEWHERE"]
    return found


def test_the_page_names_the_tests_that_there_are(tests: dict[str, str]) -> None:
    """Guards the page against a case that was added, renamed or removed since its run."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = {name: cases for cases, name in re.findall(r"^\| ([\w, ]+) \| `(tests/\S+)` \|", page, re.MULTILINE)}
    assert named == tests, "run `make reliability`"
    assert "**failed**" not in page


def test_every_fault_is_injected(tests: dict[str, str]) -> None:
    """Guards against a promise without a case."""
    assert {case for cases in tests.values() for case in cases.split(", ")} >= WANTED


def test_tests_elsewhere_exist(script: dict[str, Any]) -> None:
    """Guards the list against a test that was renamed."""
    for name in script["ELSEWHERE"]:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_what_was_missed_is_said(script: dict[str, Any]) -> None:
    """Guards the verdict: a page must not call a late or lost one well."""
    good = {"case": "T01", "injected": "kill -9 of rank 0", "note": "", "in_flight": 16, "answered": 30, "left": 0}
    passed = dict.fromkeys(script["own_tests"]() | script["ELSEWHERE"], (True, 1.0))
    good |= {"errored": 0, "cut": 0, "lost": 0, "wrong": 0, "detected_s": 0.4, "ready_s": 20.0}

    def page(**changes: Any) -> str:
        text: str = script["render"]("command", "machine", [{**good, **changes}], passed)
        return text

    assert "All of it was reached." in page()
    assert "| T01 | kill -9 of rank 0 | 16 | 30 | 0 | 0 | 0 | 0 | 0.4 | 20.0 |" in page()
    for changes in ({"lost": 1}, {"wrong": 1}, {"detected_s": 2.5}, {"ready_s": 61.0}):
        assert "Missed:" in page(**changes), changes
    assert "Missed:" not in page(case="T04", detected_s=6.0)
    one = next(iter(script["ELSEWHERE"]))
    assert "- 1 tests failed" in script["render"]("", "", [good], {**passed, one: (False, 1.0)})
    del passed[one]
    assert "- 1 of " in page(), "a run that was broken off has not reached everything"
