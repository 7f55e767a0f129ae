"""Figures can be asked for at any time, from any thread: nobody waits long, and no count ever goes back."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest
from small_engine import PROMPTS, run_config

from dist_infer import LLM, SamplingParams
from dist_infer.messages import StreamReport, TimelineReport, encode
from dist_infer.worker import local_executor, stage_runner
from dist_infer.worker.child import STREAM_REPORTS, TIMELINES
from dist_infer.worker.local_executor import SpawnedExecutor
from offload.streamer import Streamer
from partition.errors import ClusterError, WorkerError


def stream_report(rank: int, num_passes: int) -> StreamReport:
    return StreamReport(rank, num_passes, 0, 0, 0.0, 0.0, 0.0, 0.0, 0)


def answer(control: Connection, *reports: StreamReport | TimelineReport) -> None:
    control.send_bytes(json.dumps([encode(report).decode() for report in reports]).encode())


class Children:
    """An executor whose two children are the test: it answers for them, or does not."""

    def __init__(self) -> None:
        self.executor = SpawnedExecutor((), start_timeout_s=1, heartbeat_timeout_s=5, on_step=lambda step: None)
        self.controls: list[Connection] = []
        for tp_rank in range(2):
            process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            (ours, theirs), (connection, _), (heart, _) = Pipe(), Pipe(), Pipe()
            self.controls.append(theirs)
            self.executor._children.append(local_executor._Child(process, connection, ours, heart, tp_rank))

    def close(self) -> None:
        for child in self.executor._children:
            child.process.kill()
            if child.process.stdin is not None:
                child.process.stdin.close()
        self.executor.close()


@pytest.fixture
def children() -> Iterator[Children]:
    made = Children()
    yield made
    made.close()


def test_a_rank_that_is_late_is_given_as_it_was_last_known(children: Children) -> None:
    """It was an error after 30 s, and the late answer was then taken for one to the next question."""
    first, second = children.controls
    assert children.executor.stream_reports(0.01) == ()
    for rank, control in enumerate(children.controls):
        answer(control, stream_report(rank, 1))
    assert children.executor.stream_reports(5) == (stream_report(0, 1), stream_report(1, 1))
    answer(first, stream_report(0, 2))
    assert children.executor.stream_reports(0.01) == (stream_report(0, 2), stream_report(1, 1))
    answer(first, stream_report(0, 3))
    answer(second, stream_report(1, 3))
    assert children.executor.stream_reports(5) == (stream_report(0, 3), stream_report(1, 3))


def test_a_late_answer_is_never_that_to_another_question(children: Children) -> None:
    assert children.executor.stream_reports(0.01) == ()
    for rank, control in enumerate(children.controls):
        answer(control, stream_report(rank, 1))
        answer(control, TimelineReport(rank, 0.0, (), (), rank + 7))
    assert [report.num_dropped for report in children.executor.timelines()] == [7, 8]
    assert [control.recv_bytes() for control in children.controls] == [STREAM_REPORTS] * 2
    assert [control.recv_bytes() for control in children.controls] == [TIMELINES] * 2
    assert not any(control.poll() for control in children.controls)  # who owes an answer was not asked again


def test_timelines_that_do_not_come_are_an_error(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_executor, "_REPORT_TIMEOUT_S", 0.01)
    with pytest.raises(ClusterError, match=r"no report from tensor rank \[0, 1\]"):
        children.executor.timelines()


def test_nobody_waits_for_another_who_asks(children: Children) -> None:
    with children.executor._asking:
        assert children.executor.stream_reports(0.01) == ()


def test_a_rank_that_is_gone_is_said_to_be(children: Children) -> None:
    children.executor._children[1].process.kill()
    children.controls[1].close()
    answer(children.controls[0], stream_report(0, 1))
    with pytest.raises(WorkerError, match=r"tensor rank 1 .* was killed by signal 9"):
        children.executor.stream_reports(5)


def test_no_count_goes_back_while_a_pass_is_under_way(
    tiny_checkpoint: Callable[..., Path], store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stalls were counted at once and the time they are part of at the end of the pass: time spent computing fell."""
    monkeypatch.setattr(stage_runner, "_NOTE_EVERY_S", 0.0)
    seen: list[StreamReport] = []
    wait = Streamer.wait

    def watched(self: Streamer, index: int) -> Any:
        threading.Event().wait(0.001)  # a pass that takes a while
        found = wait(self, index)
        seen.extend(llm.stream_reports())
        return found

    with LLM(run_config(tiny_checkpoint("llama"), store_root, streamed=True)) as llm:
        monkeypatch.setattr(Streamer, "wait", watched)
        llm.generate(PROMPTS, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        seen.extend(llm.stream_reports())
    assert seen[-1].stall_s > 0
    assert seen[3].busy_s > 0  # within the first pass
    for name in ("busy_s", "stall_s", "compute_s", "communication_s", "bytes_read", "num_tokens", "num_passes"):
        values = [getattr(report, name) for report in seen]
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values)), name
