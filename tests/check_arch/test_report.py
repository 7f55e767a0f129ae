"""Verdict of a type, transcript, page and exit code from given findings."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dist_infer.check_arch.layout import Layout, layouts_of
from dist_infer.check_arch.models_page import checked_types, render, row_of, rows_of
from dist_infer.check_arch.report import LayoutReport, TypeReport, document, from_json, to_json, transcript
from launch.check_arch import exit_code

ONE = Layout(tensor=1, pipeline=1, streamed=False)
TWO = Layout(tensor=2, pipeline=2, streamed=True)
EQUAL = {"verdict": "equal", "path": "packed", "error": 3e-7, "num_agreeing": 24, "num_positions": 24}
WRONG = {"verdict": "wrong", "path": "packed", "error": 0.4, "num_agreeing": 2, "num_positions": 24}
REFUSED = {"verdict": "refused", "message": "no | tensor\nranks"}
FAILED = {"verdict": "failed", "message": "RuntimeError: broken"}


def report(name: str, first: dict[str, Any], second: dict[str, Any]) -> TypeReport:
    return TypeReport(
        target=name,
        model_type=name,
        architecture="AForCausalLM",
        kv_bytes_per_token=2048,
        layouts=(LayoutReport(layout=ONE, **first), LayoutReport(layout=TWO, **second)),
    )


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (EQUAL, EQUAL, "equal"),
        (EQUAL, REFUSED, "equal"),
        (REFUSED, REFUSED, "refused"),
        (EQUAL, WRONG, "wrong"),
        (WRONG, FAILED, "failed"),
        (REFUSED, FAILED, "failed"),
    ],
)
def test_the_worst_layout_decides(first: dict[str, Any], second: dict[str, Any], verdict: str) -> None:
    """Guards against one good layout hiding a bad one; a layout that is refused by name hides nothing."""
    assert report("a", first, second).verdict == verdict


@pytest.mark.parametrize(
    ("reports", "named", "walked"),
    [
        ([report("a", EQUAL, EQUAL)], 0, 0),
        ([report("a", EQUAL, REFUSED)], 0, 0),
        ([report("a", REFUSED, REFUSED)], 3, 0),
        ([TypeReport(target="a", model_type="a", problem="transformers cannot build it")], 3, 0),
        ([report("a", EQUAL, EQUAL), report("b", EQUAL, WRONG)], 1, 1),
        ([report("a", REFUSED, REFUSED), report("b", FAILED, EQUAL)], 1, 1),
        ([TypeReport(target="a", model_type="a", problem="not done within 3 s", failed=True)], 1, 1),
    ],
)
def test_exit_codes(reports: list[TypeReport], named: int, walked: int) -> None:
    """Guards CI: a refusal is no error among all types, a wrong number always is."""
    assert (exit_code(reports, walked_all=False), exit_code(reports, walked_all=True)) == (named, walked)


def test_json_goes_there_and_back() -> None:
    """Guards what a check's process sends, NaN included."""
    sent = report("a", {**WRONG, "error": math.nan}, REFUSED)
    got = from_json(to_json(sent))
    assert got.error is not None
    assert math.isnan(got.error)
    assert got.layouts[1] == sent.layouts[1]
    assert json.loads(document([sent]))["counts"] == {"wrong": 1}


def test_a_transcript_is_short() -> None:
    """Guards the fifteen lines, with every usual layout refused for the same reason."""
    layouts = tuple(LayoutReport(layout=layout, **REFUSED) for layout in layouts_of())
    lines = list(transcript(TypeReport(target="a", model_type="a", shape="layers 8", layouts=layouts)))
    assert len(lines) <= 15
    assert sum("tensor ranks" in line for line in lines) == 1


def test_layouts_are_both_tiers_and_all_degrees() -> None:
    """Guards the choice of layouts: two tensor ranks run resident and streamed, in one stage and in two."""
    found = [str(layout) for layout in layouts_of()]
    assert found == [
        "TP1 PP1 resident",
        "TP1 PP1 streamed",
        "TP1 PP2 resident",
        "TP1 PP2 streamed",
        "TP2 PP1 resident",
        "TP2 PP2 streamed",
    ]
    assert len(layouts_of(every=True)) == 8
    assert [str(layout) for layout in layouts_of((3,), (1,))] == ["TP3 PP1 resident", "TP3 PP1 streamed"]


def test_the_page_says_what_the_reports_do() -> None:
    """Guards the table: sorted, one row each, and no cell that a message breaks."""
    reports = [
        report("zeta", EQUAL, REFUSED),
        report("beta", REFUSED, REFUSED),
        TypeReport(target="gamma", model_type="gamma_text", problem="transformers cannot build it"),
    ]
    page = render(reports, "5.0")
    assert list(rows_of(page)) == ["beta", "gamma", "zeta"]
    assert rows_of(page) == {each.target: row_of(each) for each in reports}
    assert {line.count(" | ") for line in page.splitlines() if line.startswith("| `")} == {9}
    assert "3 types" in page
    assert "**1 equal** (1 packed)" in page


def test_checked_types_are_the_equal_ones() -> None:
    """Guards the list of types that are accepted: under the text part's name, and nothing that is not equal."""
    reports = [report("a", EQUAL, REFUSED), report("b", WRONG, EQUAL), report("c", REFUSED, REFUSED)]
    assert json.loads(checked_types(reports))["types"] == {"a": "packed"}
