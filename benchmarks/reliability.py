"""Runs the fault cases and writes docs/reliability.md from what they showed: the last run and no other.

    python benchmarks/reliability.py [--soak SECONDS] [-k EXPRESSION]

The cases are tests (tests/reliability) and those elsewhere that are listed here; each injection writes a line of
figures (tests/reliability/figures.py). With -k nothing is written, only shown. Exit code 1 when a case failed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
OWN = ROOT / "tests" / "reliability"
ENVIRONMENT = "DIST_INFER_RELIABILITY"
# cases that other tests inject, beside those of OWN
ELSEWHERE = {
    "tests/system/test_ray_lifecycle.py::test_a_rank_that_raises_while_loading_ends_the_launch_with_its_error": "T06",
    "tests/system/test_ray_lifecycle.py::test_the_start_deadline_holds": "T06",
    "tests/runs/test_killed.py::test_a_killed_driver": "T07, T27",
    "tests/runs/test_in_a_cluster.py::test_a_killed_driver": "T07, T27",
    "tests/faults/test_memory.py::test_a_group_smaller_than_the_plan_is_refused_with_both_figures": "T10",
    "tests/faults/test_memory.py::test_a_rank_killed_for_memory_is_said_to_be": "T10",
    "tests/openai/test_crowds.py::test_leaving_at_every_moment": "T22",
    "tests/runs/test_names.py::test_the_second_run_of_a_name_is_refused_and_named_the_first": "T25",
    "tests/runs/test_names.py::test_of_eight_at_once_one_gets_the_name": "T26",
    "tests/runs/test_processes.py::test_all_that_carries_the_mark_is_ended": "T27",
    "tests/system/test_ray_lifecycle.py::test_ctrl_c_ends_everything": "T28",
    "tests/runs/test_killed.py::test_interrupted_before_it_serves": "T28",
    "tests/runs/test_killed.py::test_interrupted_before_anything": "T28",
    "tests/runs/test_killed.py::test_interrupted_twice_while_draining": "T28",
    "tests/runs/test_served.py::test_drain_then_down": "T29",
    "tests/system/test_ray_head.py::test_a_process_of_ray_that_is_killed_is_a_pause": "T32",
    # together, in this order: they share a cluster, and the last one ends it
    "tests/namespaces/test_two_hosts.py::test_a_short_cut_is_a_pause": "T31",
    "tests/namespaces/test_two_hosts.py::test_a_host_that_is_cut_off_is_done_without_and_comes_back_fenced": "T31",
    "tests/namespaces/test_two_hosts.py::test_without_rays_head_open_requests_finish_and_later_ones_are_told": "T32",
    "tests/openai/test_crowds.py::test_no_answer_has_another_s_secret": "T36",
}
_COLUMNS = ("case", "injected", "in flight", "answered", "left", "errored", "cut", "lost", "detected s", "ready s")
_RANK_S, _SILENT_S, _READY_S = 2.0, 7.0, 60.0
_HEAD = """# Reliability

What happens to requests when something breaks. Written by `make reliability` from its last run; do not edit it by hand.

    {command}

{machine}

{load}
"""
_LOAD = """\
Load, unless it says otherwise: 12 clients that stream and 4 that do not, each asking again as soon as it has its
answer, greedy in float32, on a tiny model as TP2×PP2 with streamed weights.

- *answered*: the text of an undisturbed run, byte by byte, none missing and none twice;
- *left*: the client went away itself;
- *errored*: an explicit error in OpenAI's shape;
- *cut*: the connection ended, which only the death of the process that holds it may do, or a door that closes behind a
  run that was told to end;
- *lost*: no end within two minutes;
- *detected*: seconds from the injection until `/health/ready` is not 200 any more (a dash: it was all the time);
- *ready*: seconds from the injection until all is as it was.

After each case that a run survives the endpoint was ready, a golden request got its text, no KV block was in use, and
no process that had lived through it held more memory, descriptors or threads than before."""


def own_tests() -> dict[str, str]:
    """The tests that inject something, as pytest names them, and the cases that their descriptions name."""
    found = {}
    for file in sorted(OWN.glob("test_*.py")):
        if file.name == "test_page.py":
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                cases = re.findall(r"\bT\d\d\b", ast.get_docstring(node) or "")
                found[f"{file.relative_to(ROOT)}::{node.name}"] = ", ".join(dict.fromkeys(cases)) or "random"
    return found


def machine() -> str:
    """One sentence on where this runs, and one on what was beside it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "transformers")]
    memory = psutil.virtual_memory().total / (1 << 30)
    return (
        f"{os.cpu_count()} cores of {', '.join(sorted(names)) or platform.machine()}, {memory:.0f} GiB; Linux "
        f"{platform.release()}, Python {platform.python_version()}, {', '.join(versions)}."
    )


def outcomes(report: Path) -> dict[str, tuple[bool, float]]:
    """By test: whether all of its cases passed, and their seconds together."""
    found: dict[str, tuple[bool, float]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        name = f"{file}::{case.get('name', '').partition('[')[0]}"
        passed = all(case.find(bad) is None for bad in ("failure", "error", "skipped"))
        was, seconds = found.get(name, (True, 0.0))
        found[name] = (was and passed, seconds + float(case.get("time", 0)))
    return found


def render(
    command: str, where: str, figures: Sequence[Mapping[str, Any]], ran: Mapping[str, tuple[bool, float]]
) -> str:
    """The page."""
    lines = [_HEAD.format(command=command, machine=where, load=_LOAD), *_table(figures), "", *_verdict(figures, ran)]
    lines += ["", "## Tests", "", "Those above, and those whose cases have no such load.", ""]
    lines += ["| case | test | outcome | seconds |", "| --- | --- | --- | ---: |"]
    for name, cases in sorted((own_tests() | ELSEWHERE).items(), key=lambda item: (item[1], item[0])):
        outcome, seconds = "no outcome", "–"
        if name in ran:
            outcome, seconds = ("passed" if ran[name][0] else "**failed**"), f"{ran[name][1]:.0f}"
        lines.append(f"| {cases} | `{name}` | {outcome} | {seconds} |")
    return "\n".join(lines) + "\n"


def _table(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    notes: list[str] = []
    rows = []
    for one in sorted(figures, key=lambda one: one["case"]):
        mark = ""
        if one["note"]:
            if one["note"] not in notes:
                notes.append(one["note"])
            mark = f" ({notes.index(one['note']) + 1})"
        counts = [one[key] for key in ("in_flight", "answered", "left", "errored", "cut", "lost")]
        seconds = ["–" if one[key] is None else f"{one[key]:.1f}" for key in ("detected_s", "ready_s")]
        rows.append(f"| {one['case']} | {one['injected']}{mark} | {' | '.join(map(str, [*counts, *seconds]))} |")
    head = [f"| {' | '.join(_COLUMNS)} |", f"| --- | --- |{' ---: |' * (len(_COLUMNS) - 2)}"]
    below = ["", *(f"({number}) {note}.  " for number, note in enumerate(notes, 1))] if notes else []
    return [*head, *rows, *below]


def _verdict(figures: Sequence[Mapping[str, Any]], ran: Mapping[str, tuple[bool, float]]) -> list[str]:
    """What was wanted of the rows, every row that missed it, and the tests that cannot vouch for theirs."""
    missed = []
    for one in figures:
        if one["lost"] or one["wrong"]:
            missed.append(f"{one['injected']}: {one['lost']} lost, {one['wrong']} wrong")
        limit_s = _SILENT_S if one["case"] == "T04" else _RANK_S
        if "rank" in one["injected"] and (one["detected_s"] or 0) > limit_s:
            missed.append(f"{one['injected']}: detected after {one['detected_s']} s, wanted {limit_s:g} s")
        if (one["ready_s"] or 0) > _READY_S:
            missed.append(f"{one['injected']}: ready after {one['ready_s']} s, wanted {_READY_S:g} s")
    wanted = f"a dead rank detected in {_RANK_S:g} s, a silent one in {_SILENT_S:g} s, ready again in {_READY_S:g} s"
    tests = own_tests() | ELSEWHERE
    failed = [name for name in tests if name in ran and not ran[name][0]]
    if unknown := sum(name not in ran for name in tests):
        missed.append(f"{unknown} of {len(tests)} tests have no outcome: the run was broken off, or they were left out")
    if failed:
        missed.append(f"{len(failed)} tests failed: a case that was not survived has no row above")
    lines = [f"Wanted: none lost, no wrong text, {wanted}. {'All of it was reached.' if not missed else 'Missed:'}"]
    return [*lines, *([""] if missed else []), *(f"- {line}" for line in missed)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--soak", type=float, default=60.0, help="seconds of T35")
    parser.add_argument("-k", dest="expression", help="only these cases; shown, not written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        record, report = Path(directory) / "figures.jsonl", Path(directory) / "report.xml"
        record.touch()
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        command += ["-k", options.expression] if options.expression else []
        tests = list(ELSEWHERE) if not options.expression else []
        settings = {ENVIRONMENT: str(record), f"{ENVIRONMENT}_WHOLE": "1", "DIST_INFER_SOAK_S": str(options.soak)}
        done = subprocess.run(
            [*command, str(OWN.relative_to(ROOT)), *tests, "--deselect", f"{OWN.relative_to(ROOT)}/test_page.py"],
            cwd=ROOT,
            env={**os.environ, **settings},
            check=False,
        )
        figures = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        page = render(f"python benchmarks/reliability.py --soak {options.soak:g}", machine(), figures, outcomes(report))
    if options.expression:
        print(page)
    else:
        PAGE.write_text(page, encoding="utf-8")
    return int(done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
