"""FAULTS T01, T04 on Ray, TP2×PP2: a rank killed in the middle of a pass, one that stops, one killed while idle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from request_crowd import PROMPTS, Crowd, run_config
from served_model import wait_until

from dist_infer import LLM
from dist_infer.backend import RankSpec
from dist_infer.engine.executor import Executor
from dist_infer.gang import Gang
from dist_infer.gang_state import Degraded, Ready

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
RECOVERED_S = 150.0


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def undisturbed(model: Path, store_root: Path) -> list[list[int]]:
    """One process, nothing lost."""
    with LLM(run_config(model, store_root)) as llm:
        return Crowd(llm).tokens()


@pytest.fixture(scope="module")
def four(model: Path, store_root: Path) -> Iterator[LLM]:
    config = run_config(
        model, store_root, parallel={"tensor": 2, "pipeline": 2}, cluster={"device": "cpu", "executor": "ray"}
    )
    with LLM(config) as llm:
        yield llm


def pids(llm: LLM) -> list[int]:
    return [report.pid for report in llm.worker_reports]


def assert_replaced(llm: LLM, before: list[int], undisturbed: list[list[int]]) -> None:
    wait_until(lambda: isinstance(llm.state, Ready) and llm.stats.num_gang_restarts > 0, RECOVERED_S)
    assert not set(before) & set(pids(llm))
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert Crowd(llm, prompts=PROMPTS[:1]).tokens() == undisturbed[:1]
    wait_until(lambda: llm.stats.num_running == llm.stats.num_waiting == 0)
    assert llm.stats.num_free_kv_blocks == llm.stats.num_kv_blocks
    llm.integrity()


def test_a_rank_that_is_killed_is_a_pause(four: LLM, undisturbed: list[list[int]]) -> None:
    """T01: the cause names the rank that died, not one of the peers that lost their connections."""
    before = pids(four)
    crowd = Crowd(four)
    assert crowd.has_begun.wait(60)
    os.kill(before[2], signal.SIGKILL)
    wait_until(lambda: isinstance(four.state, Degraded), 20)
    assert "rank 2 died" in four.state.cause
    assert crowd.tokens() == undisturbed
    assert_replaced(four, before, undisturbed)


def test_a_rank_that_stops_is_found_by_its_silence(
    four: LLM, undisturbed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T04: its peers wait in collectives and in a receive, and say so; a step may take ten minutes.

    All have given their memory back when others are planned and started.
    """
    before = pids(four)
    left: list[list[int]] = []  # before each start
    make = Gang._make_executor

    def noted(self: Gang, spec: RankSpec) -> Executor:
        left.append([pid for pid in before if psutil.pid_exists(pid)])
        return make(self, spec)

    monkeypatch.setattr(Gang, "_make_executor", noted)
    crowd = Crowd(four)
    assert crowd.has_begun.wait(60)
    os.kill(before[1], signal.SIGSTOP)
    wait_until(lambda: isinstance(four.state, Degraded), 60)
    assert "rank 1 has not answered for 5 s" in four.state.cause
    assert crowd.tokens() == undisturbed
    assert left == [[]]
    assert_replaced(four, before, undisturbed)


def test_a_rank_that_is_killed_while_nobody_asks_is_replaced(four: LLM, undisturbed: list[list[int]]) -> None:
    before = pids(four)
    os.kill(before[3], signal.SIGKILL)
    wait_until(lambda: isinstance(four.state, Degraded), 20)
    assert "rank 3 died" in four.state.cause
    assert_replaced(four, before, undisturbed)
