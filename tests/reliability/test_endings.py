"""Injections that end a run, or all of Ray: nobody waits for ever, nothing is left, the next launch works at once.

The local executor: ranks are children of the replica. Runs of one name, one after the other.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from named_runs import until
from reliability.clients import NUM_STREAMING, Asked, Clients
from reliability.figures import IS_WHOLE, count
from reliability.injections import end_driver, kill_rank, kill_role
from reliability.suffering import Case, assert_ends, assert_told, suffer
from reliability.system import System

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
_GONE_S = 15.0
_INTERRUPTED_S = 10.0
RAY_PARTS = {
    "gcs": "head (gcs_server)",
    "raylet": "raylet",
    "agent": "dashboard agent",
    "environments": "runtime environment agent",
}


@pytest.fixture
def system(module_system: System) -> System:
    module_system.revive()
    return module_system


@pytest.fixture(scope="module")
def module_system(launch: Callable[..., System], config: dict[str, Any]) -> System:
    return launch({**config, "run": {"kind": "serve", "limits": {"drain_time": 1}}})


@dataclass(frozen=True, kw_only=True)
class Ending:
    """told_s: when the signal was sent, of the monotonic clock; gone_s: seconds until the process was gone."""

    asked: list[Asked]
    in_flight: int
    told_s: float
    gone_s: float


def end_under_load(system: System, number: signal.Signals, within_s: float) -> Ending:
    with Clients(system.url, system.questions) as clients:
        until(lambda: clients.num_busy >= NUM_STREAMING // 2, 60)
        in_flight, told_s = clients.num_in_flight, time.monotonic()
        driver = end_driver(system, number)
        assert not psutil.wait_procs([driver], timeout=within_s)[1], f"it was there after {within_s:g} s"
        gone_s = time.monotonic() - told_s
        asked = clients.finish()
    return Ending(asked=asked, in_flight=in_flight, told_s=told_s, gone_s=gone_s)


@pytest.mark.whole
def test_a_child_of_the_replica_is_killed(system: System) -> None:
    """T01 with the local executor: a pause, as on Ray."""
    suffer(system, Case(id="T01", injected="kill -9 of tensor rank 1 (local executor)", inject=kill_rank(1)))


def test_the_driver_is_killed(system: System) -> None:
    """T07: connections are cut, no request hangs, all processes are gone; the next launch of the name is ready."""
    home = system.shell.record("tiny").home
    ending = end_under_load(system, signal.SIGKILL, 5)
    began_s = time.monotonic()
    _, alive = psutil.wait_procs(system.shell.processes(), timeout=_GONE_S)
    gone_s = time.monotonic() - began_s
    assert alive == []
    assert home is not None
    until(lambda: not os.path.exists(home), 5)
    again_s = system.launch()
    note = f"all processes gone after {gone_s:.1f} s; ready: a new launch"
    count("T07", "kill -9 of the driver", ending.asked, in_flight=ending.in_flight, ready_s=again_s, note=note)
    assert_ends(ending.asked, may_fail=True, may_cut=True)


@pytest.mark.parametrize("role", ["gcs", "raylet", "agent", "environments"] if IS_WHOLE else ["raylet"])
def test_a_part_of_ray_is_killed(system: System, role: str) -> None:
    """T32: Ray cannot be mended in parts: it is started again with all that is in it, at the same address.

    The run is detached: without a parent Ray would end its driver with the raylet.
    """
    case = Case(
        id="T32",
        injected=f"kill -9 of Ray's {RAY_PARTS[role]}",
        inject=kill_role(role),
        may_fail=True,
        may_cut=True,
        note="Ray is started again, and the replica with it",
    )
    suffer(system, case)
    assert [len(system.of_role(each)) for each in RAY_PARTS] == [1, 1, 1, 1]  # of the one before nobody is left


def test_an_answer_that_is_longer_than_the_drain(system: System) -> None:
    """T29: what is not done in drain_time ends with an error that says so; exit 0."""
    ending = end_under_load(system, signal.SIGTERM, 30)
    note = f"ended after {ending.gone_s:.1f} s, exit 0"
    count("T29", "SIGTERM, drain_time 1 s", ending.asked, in_flight=ending.in_flight, note=note)
    assert_told(ending.asked, ending.told_s)
    record = system.shell.record("tiny")
    assert (record.state, record.exit_code) == ("ended", 0)
    assert system.shell.run("down", "tiny").code == 0
    system.shell.assert_nothing_left()


@pytest.mark.whole
def test_interrupted_under_load(system: System) -> None:
    """T28: Ctrl-C: within 10 s, every request with an end that it can read, nothing left."""
    ending = end_under_load(system, signal.SIGINT, _INTERRUPTED_S)
    note = f"ended after {ending.gone_s:.1f} s"
    count("T28", "Ctrl-C while serving", ending.asked, in_flight=ending.in_flight, note=note)
    assert_told(ending.asked, ending.told_s)
    assert system.shell.run("down", "tiny").code == 0
    system.shell.assert_nothing_left()
