"""FAULTS T32: Ray's own processes killed under requests. A Ray that was started for the run is started again."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from request_crowd import Crowd, run_config
from served_model import wait_until

from dist_infer import LLM
from dist_infer.gang_state import Ready

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def two(model: Path, store_root: Path) -> Iterator[LLM]:
    """Two stages."""
    config = run_config(model, store_root, parallel={"pipeline": 2}, cluster={"device": "cpu", "executor": "ray"})
    with LLM(config) as llm:
        yield llm


@pytest.fixture(scope="module")
def undisturbed(two: LLM) -> list[list[int]]:
    return Crowd(two).tokens()


def process_of_ray(name: str) -> psutil.Process:
    (found,) = [child for child in psutil.Process().children() if child.name() == name]
    return found


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_process_of_ray_that_is_killed_is_a_pause(two: LLM, undisturbed: list[list[int]], name: str) -> None:
    """T32. Ranks go on without a head and their requests with them, but nothing could replace one."""
    restarts, before = two.stats.num_gang_restarts, [report.pid for report in two.worker_reports]
    victim = process_of_ray(name)
    crowd = Crowd(two)
    assert crowd.has_begun.wait(60)
    victim.send_signal(signal.SIGKILL)
    assert crowd.tokens() == undisturbed
    wait_until(lambda: two.stats.num_gang_restarts == restarts + 1 and isinstance(two.state, Ready), 120)
    assert process_of_ray(name).pid != victim.pid
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before), 20)
    assert Crowd(two).tokens() == undisturbed
    two.integrity()
