"""Two stages, a process each, as on two nodes but without Ray: two steps under way, and what breaks between them."""

from __future__ import annotations

import ctypes
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from request_crowd import Crowd, run_config

from dist_infer import LLM, gang
from dist_infer.backend import LocalBackend, OnStep, RankSpec
from dist_infer.engine.executor import Executor
from dist_infer.messages import StepPlan
from dist_infer.outputs import Failed
from dist_infer.worker.local_executor import SpawnedExecutor
from partition.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
_PIDFD_GETFD = 438


class Counting(SpawnedExecutor):
    """Knows how many steps were under way at one time."""

    most = 0

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        Counting.most = max(Counting.most, len(self._in_flight))


class StageProcesses(LocalBackend):
    """A process for each stage."""

    def executor(self, spec: RankSpec, on_step: OnStep) -> Executor:
        setups = [spec.setup((rank.rank,), ("cpu",), 1) for rank in spec.plan.ranks]
        return Counting(
            setups,
            start_timeout_s=self._config.start_timeout,
            heartbeat_timeout_s=self._config.heartbeat_timeout,
            on_step=on_step,
        )

    def computes_here(self, plan: Plan) -> bool:
        return False


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture
def two_stages(model: Path, store_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr(gang, "make_backend", lambda config, name, apart: StageProcesses(config))
    with LLM(run_config(model, store_root, parallel={"pipeline": 2}, cluster={"max_restarts": 0})) as llm:
        yield llm


def test_two_steps_under_way_give_the_same_tokens_as_one_stage(two_stages: LLM, model: Path, store_root: Path) -> None:
    """Hidden states of one step must not be mixed up with those of the other, nor overwritten while they are sent."""
    assert two_stages.plan.max_steps_in_flight == 2
    found = Crowd(two_stages).tokens()
    assert Counting.most == 2
    with pytest.MonkeyPatch.context() as restored:
        restored.setattr(gang, "make_backend", lambda config, name, apart: LocalBackend(config))
        with LLM(run_config(model, store_root)) as one:
            assert Crowd(one).tokens() == found


def break_connections(pid: int, other: int) -> int:
    """How many TCP connections between two living processes were there, and are no more."""
    theirs = {(found.raddr, found.laddr) for found in psutil.Process(other).net_connections("tcp")}
    handle = os.pidfd_open(pid)
    broken = 0
    for found in psutil.Process(pid).net_connections("tcp"):
        if (found.laddr, found.raddr) in theirs:
            fd = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, handle, found.fd, 0)
            assert fd >= 0, os.strerror(ctypes.get_errno())
            with socket.socket(fileno=fd) as connection:
                connection.shutdown(socket.SHUT_RDWR)
            broken += 1
    os.close(handle)
    return broken


def test_a_connection_between_stages_that_breaks_reaches_every_request(two_stages: LLM) -> None:
    """Both ranks live and answer heartbeats; whichever of them speaks first names the other, the step and requests."""
    crowd = Crowd(two_stages)
    assert crowd.has_begun.wait(60)
    assert break_connections(*(report.pid for report in two_stages.worker_reports)) > 0
    failed = [str(end.error) for end in crowd.ends() if isinstance(end, Failed)]
    assert failed
    for words in failed:
        assert re.search(
            r"(hidden states did not get to rank 1|no hidden states from rank 0 within 600 s \(engine.step_timeout\)): "
            r".*\(rank \d.*, step \d+, requests request-",
            words,
            re.DOTALL,
        ), words
