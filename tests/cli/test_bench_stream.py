"""`dist-infer bench stream` on a real, tiny, streamed model: its figures agree with each other and with the plan."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch import cli

BATCHES = (1, 3)
ROUNDS = 2
NEW_TOKENS = 6
ROOT = Path(cli.__file__).resolve().parent.parent
EXIT_LIMIT_S = 10.0


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`dist-infer …` in this process, through the entry point."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["dist-infer", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    return run


def write_run(directory: Path, model: Path, command: Command | None = None, **sections: Any) -> Path:
    """A run file; with `command`, one with too little memory for the layers, so that a third of them is streamed."""
    content: dict[str, Any] = {
        "model": {"path": str(model)},
        "offload": {"store": "stores"},
        "cluster": {"device": "cpu"},
        "engine": {"max_model_len": 32, "kv_memory": "256 KiB", "max_requests": 4, "max_batch_tokens": 16},
        **sections,
    }
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    if command is not None:
        plan = json.loads(command("plan", file, "--json").out)
        weights = sum(unit["num_bytes"] for rank in plan["ranks"] for unit in rank["units"])
        content["offload"]["host_memory"] = plan["budgets"][0]["used_bytes"] - weights // 3
        file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def run_file(tiny_checkpoint: Callable[..., Path], tmp_path: Path, command: Command) -> Path:
    return write_run(tmp_path, tiny_checkpoint("llama"), command)


def quick(*batches: int) -> list[str]:
    flags = ["--rounds", str(ROUNDS), "--prompt-tokens", "3", "--new-tokens", str(NEW_TOKENS), "--raw-seconds", "0.05"]
    return flags + [word for batch in batches for word in ("--batch", str(batch))]


@pytest.fixture
def measured(command: Command, run_file: Path, tmp_path: Path) -> tuple[dict[str, Any], str, dict[str, Any], str]:
    """(the JSON, the page, the trace, what people read) of one run."""
    page, trace = tmp_path / "out.html", tmp_path / "out.json"
    done = command("bench", "stream", run_file, *quick(*BATCHES), "--json", "--report", page, "--trace", trace)
    assert done.code == 0, done.err
    return json.loads(done.out), page.read_text(), json.loads(trace.read_text()), done.err


def test_figures_agree_with_each_other_and_the_plan(
    measured: tuple[dict[str, Any], str, dict[str, Any], str], command: Command, run_file: Path
) -> None:
    """Guards the whole: a pass counted twice, a prompt's pass among the decodes, bytes of another batch."""
    found, page, trace, shown = measured
    plan = json.loads(command("plan", run_file, "--json").out)
    (rank,) = plan["ranks"]
    assert 0 < found["planned_bytes_per_pass"] < found["total_bytes"]
    assert found["resident_bytes"] <= found["total_bytes"] - found["planned_bytes_per_pass"] + 4096 * len(rank["units"])
    assert [each["batch"] for each in found["batches"]] == list(BATCHES)
    rates = [rate["bytes_per_s"] for rate in found["raw"]]
    assert len(rates) == 1 + ROUNDS * len(BATCHES)
    after = 1
    for number in range(ROUNDS):
        for each in found["batches"]:
            one = each["rounds"][number]
            assert one["number"] == number + 1
            assert one["num_passes"] == NEW_TOKENS - 2  # the prompt's and the first decode are not timed
            assert one["tokens_per_pass"] == each["batch"]
            rows = (
                each["batch"] * 2 * 4096
            )  # an embedding that stays on disk gives a row, in whole pages, to each token
            assert 0 <= one["bytes_per_pass"] - found["planned_bytes_per_pass"] <= rows
            assert math.isclose(one["bytes_per_s"] * one["seconds_per_pass"], one["bytes_per_pass"])
            assert math.isclose(one["tokens_per_s"] * one["seconds_per_pass"], each["batch"])
            assert math.isclose(one["raw_bytes_per_s"], (rates[after - 1] + rates[after]) / 2)
            assert math.isclose(one["percent_of_raw"], 100 * one["bytes_per_s"] / one["raw_bytes_per_s"])
            assert one["stall_s"] + one["compute_s"] + one["communication_s"] <= one["seconds_per_pass"]
            assert 0 <= one["exposed_s"] <= one["seconds_per_pass"]
            after += 1
    for each in found["batches"]:
        both = sorted(one["tokens_per_s"] for one in each["rounds"])
        assert both[0] <= each["median"]["tokens_per_s"] <= both[1]
        ratio = each["median"]["tokens_per_s"] / each["predicted_tokens_per_s"]
        assert math.isclose(each["achieved_of_predicted"], ratio)
        assert set(each["stall_s_per_unit"]) <= {unit["name"] for unit in rank["units"]}
        assert each["verdict"].startswith(f"{each['bound_by']}-bound") or each["verdict"].startswith("neither")
        assert f"round {ROUNDS}/{ROUNDS}, batch {each['batch']}" in shown

    check_trace(trace, {unit["name"] for unit in rank["units"]}, rank["num_slots"])
    check_page(page, {unit["name"] for unit in rank["units"]})


def check_trace(trace: dict[str, Any], units: set[str], num_slots: int) -> None:
    """Chrome's format; in a slot one read follows the other, and the computing thread does one thing at a time."""
    assert set(trace) >= {"traceEvents", "displayTimeUnit"}
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    kinds: dict[str, set[str]] = defaultdict(set)
    computing: list[tuple[float, float]] = []
    named = set()
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M")
        if event["ph"] == "M":
            named.add((event["pid"], event["tid"]))
            continue
        assert event["ts"] >= -0.001
        assert event["dur"] >= 0
        span = (event["ts"], event["ts"] + event["dur"])
        lanes[event["pid"], event["tid"]].append(span)
        kinds[event["cat"]].add(event["name"])
        if event["cat"] in ("wait", "compute"):
            computing.append(span)
        if event["cat"] == "read":
            assert 0 <= event["args"]["slot"] < num_slots
            assert event["args"]["bytes"] > 0
    assert lanes.keys() <= named
    assert kinds["compute"] == units
    assert kinds["read"] == kinds["wait"] <= units
    assert len(kinds["read"]) > 1
    for spans in [*lanes.values(), computing]:
        spans.sort()
        for (_, end), (start, _) in pairwise(spans):
            assert start >= end - 0.01  # µs are rounded to thousandths


def check_page(page: str, units: set[str]) -> None:
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://|src=|@import|url\(", page)  # nothing is fetched
    for unit in units:
        assert f"{unit}: " in page
    assert "prefers-color-scheme:dark" in page
    assert page.count("<svg") == 1 + 2 * len(BATCHES)  # shares; labels and plot for each batch


def test_everything_resident_is_said_and_has_no_percent(
    command: Command, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Guards against a division by bytes that nobody read."""
    file = write_run(tmp_path, tiny_checkpoint("llama"))
    done = command("bench", "stream", file, *quick(1), "--json", "--report", tmp_path / "out.html")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["planned_bytes_per_pass"] == 0
    assert found["batches"][0]["median"]["percent_of_raw"] is None
    assert found["batches"][0]["median"]["bytes_per_pass"] == 0
    assert (tmp_path / "out.html").stat().st_size > 0


def test_without_wishes_batches_are_those_that_fit(command: Command, run_file: Path) -> None:
    """Guards the defaults 1, 8, 32 on a plan with room for four: no preemption, and no batch twice."""
    done = command("bench", "stream", run_file, *quick(), "--json")
    assert done.code == 0, done.err
    assert [each["batch"] for each in json.loads(done.out)["batches"]] == [1, 4]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--batch", "5"), ("--batch 5", "engine.max_requests, 4")),
        (("--batch", "0"), ("--batch 0", "at least 1")),
        (("--rounds", "0"), ("--rounds 0",)),
        (("--new-tokens", "3"), ("--new-tokens 3", "at least 4")),
        (("--prompt-tokens", "0"), ("--prompt-tokens 0",)),
        (("--raw-seconds", "0"), ("--raw-seconds 0",)),
        (("--report", "/absent/out.html"), ("--report /absent/out.html", "folder")),
        (("--trace", "/"), ("--trace /", "file")),
        (("--set", "paralel.tensor=2"), ("did you mean `parallel`",)),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_before_anything_is_packed(
    flags: tuple[str, ...], parts: tuple[str, ...], command: Command, run_file: Path
) -> None:
    done = command("bench", "stream", run_file, *flags)
    assert (done.code, done.out) == (2, "")
    for part in parts:
        assert part in done.err
    assert not (run_file.parent / "stores").exists()


def test_sequences_longer_than_the_plan_allows_are_refused(command: Command, run_file: Path) -> None:
    """The plan decides the length; the message names the key."""
    done = command("bench", "stream", run_file, "--new-tokens", "40")
    assert done.code == 2
    assert "engine.max_model_len" in done.err


@pytest.mark.slow
def test_ranks_in_processes_of_their_own_send_their_timelines(
    command: Command, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Guards the way of the timelines over a socket, and that two ranks' bytes add up."""
    file = write_run(tmp_path, tiny_checkpoint("llama"), command, parallel={"tensor": 2})
    trace = tmp_path / "out.json"
    done = command("bench", "stream", file, *quick(2), "--json", "--trace", trace)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["num_ranks"] == 2
    assert found["planned_bytes_per_pass"] > 0
    for one in found["batches"][0]["rounds"]:
        assert 0 <= one["bytes_per_pass"] - found["planned_bytes_per_pass"] <= 2 * 2 * 2 * 4096
        assert one["communication_s"] > 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events if event.get("cat") == "read"} == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "raw read:", "round 1"])
def test_ctrl_c_at_any_moment_leaves_nothing(
    moment: str, command: Command, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Guards the threads of raw reads, which must not hold the process, and the half of a report."""
    file = write_run(tmp_path, tiny_checkpoint("llama"), command)
    page = tmp_path / "out.html"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "bench", "stream", str(file), "--rounds", "1000", "--report", str(page)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert any(moment in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=EXIT_LIMIT_S)
        assert process.returncode == 130, out
        assert "Traceback" not in out
        assert not page.exists()
        assert not [other for other in psutil.process_iter() if _session(other) == process.pid]
    finally:
        process.kill()
        process.wait(10)


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else None
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None
