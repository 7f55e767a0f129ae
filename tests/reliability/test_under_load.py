"""One run on Ray, TP2×PP2, that serves 16 clients without pause while it is hurt, case after case; then it is drained.

What is judged of every case: `suffering.suffer`. The figures are docs/reliability.md's.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from named_runs import until
from reliability.clients import NUM_STREAMING, Clients
from reliability.figures import IS_WHOLE, count
from reliability.injections import (
    Clock,
    another_of,
    ask_too_much,
    crowd_of_long_ones,
    damage_blobs,
    end_driver,
    fail_reads,
    kill_rank,
    kill_role,
    launch_again,
    skew_clock,
    stop_rank,
)
from reliability.suffering import Case, Hurt, assert_told, suffer
from reliability.system import System

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_MOMENTS = 20 if IS_WHOLE else 3
SEED = 6
_LATEST_MOMENT_S = 3.0
_DRAINED_S = 40.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the loss of a process does to a run that goes on."""

    is_noticed: bool = False
    may_cut: bool = False
    is_replaced_unnoticed: bool = False


SURVIVED = {
    "rank": Rule(is_noticed=True),
    "replica": Rule(is_noticed=True, may_cut=True),
    "gcs": Rule(is_noticed=True, may_cut=True),  # all of Ray is started again
    "controller": Rule(is_replaced_unnoticed=True),
    "templates": Rule(),
    "grammars": Rule(),
    "dashboard": Rule(),
    "monitor": Rule(),
    "log monitor": Rule(),
}


@pytest.fixture
def system(module_system: System) -> System:
    module_system.revive()
    return module_system


@pytest.fixture(scope="module")
def module_system(launch: Callable[..., System], streamed: dict[str, Any], clock: Clock) -> System:
    made = launch({**streamed, "cluster": {**streamed["cluster"], "executor": "ray"}}, clock.environment)
    assert made.scrape().sum("dist_infer_rank_units", tier="nvme") > 0, "the budget no longer makes it stream"
    return made


@pytest.mark.parametrize("number", range(4) if IS_WHOLE else (3,))
def test_a_rank_is_killed(system: System, number: int) -> None:
    """T01: a pause for everybody, an error for nobody."""
    suffer(system, Case(id="T01", injected=f"kill -9 of rank {number}", inject=kill_rank(number)))


def test_one_rank_raises_in_a_forward(system: System, store: Path) -> None:
    """T03: a damaged unit is an exception on the rank that reads it, and in no other."""
    units = [f"layers.{number}" for number in range(6, 12)]
    injected = "units of rank 3 damaged on disk: it raises in its forward"
    suffer(system, Case(id="T03", injected=injected, inject=damage_blobs(store, units, 1)))


def test_a_rank_stops_for_a_while(system: System) -> None:
    """T04: found by its silence, killed, replaced; when its 30 s are over it is not there any more."""
    suffer(system, Case(id="T04", injected="SIGSTOP of rank 1 for 30 s", inject=stop_rank(1)))


def test_a_clock_that_is_wrong(system: System, clock: Clock) -> None:
    """T05: a rank's clock jumps by 20 s and back; nobody notices, since only the coordinator keeps time."""
    injected = "clock of rank 2 jumps 20 s ahead, and back"
    suffer(system, Case(id="T05", injected=injected, inject=skew_clock(clock, 2), is_noticed=False))


def test_more_than_the_cache_holds(system: System) -> None:
    """T08: room for three of them; all twelve are answered, after preemptions."""
    injected = "12 sequences at once beside the load, room for 3 of them"
    inject = crowd_of_long_ones(12, " a long way to the sea", 150)
    suffer(system, Case(id="T08", injected=injected, inject=inject, is_noticed=False, num_clients=(3, 1)))


def test_more_than_the_cache_can_ever_hold(system: System) -> None:
    """T09: refused at once, with a code that a client can act on."""
    injected = "a prompt, and a max_tokens, beyond the KV cache: 400"
    suffer(system, Case(id="T09", injected=injected, inject=ask_too_much(5000), is_noticed=False))


def test_reads_that_fail_now_and_then(system: System, tmp_path: Path) -> None:
    """T15: read again, counted, and no more."""
    injected = "EIO at every fifth read of rank 0"
    suffer(system, Case(id="T15", injected=injected, inject=fail_reads(0, tmp_path), is_noticed=False))


def test_a_second_launch_of_the_name(system: System) -> None:
    """T25: refused with pid and URL of the first, which does not notice."""
    inject = launch_again(words="pid {pid}, {url}")
    suffer(system, Case(id="T25", injected="a second launch of the name", inject=inject, is_noticed=False))


def test_a_port_that_is_taken(system: System) -> None:
    """T26: another run that wants the same port is told which."""
    inject = launch_again("name=other", words="{port}")
    suffer(system, Case(id="T26", injected="a launch on the port of the first", inject=inject, is_noticed=False))


def test_nobody_gets_another_s_secret(system: System) -> None:
    """T22, T36: every third stream is left; each answer is the undisturbed one, with its own prompt's secret."""

    def inject(system: System, clients: Clients) -> Hurt:
        until(lambda: sum(asked.end == "left" for asked in list(clients.asked)) >= 12, 60)
        return Hurt()

    suffer(
        system,
        Case(id="T36", injected="every third stream is left", inject=inject, is_noticed=False, leave_every=3),
    )


@pytest.mark.whole
def test_serve_s_controller_is_killed(system: System) -> None:
    """T07: no request notices; Ray starts another one."""
    inject = kill_role("controller", is_back=another_of("controller"))
    suffer(system, Case(id="T07", injected="kill -9 of Serve's controller", inject=inject, is_noticed=False))


def test_the_replica_is_killed(system: System) -> None:
    """T07: it holds the clients' connections, which are cut; another one listens at the same address."""
    case = Case(
        id="T07",
        injected="kill -9 of the replica",
        inject=kill_role("replica"),
        may_fail=True,
        may_cut=True,
        note="the clients' connections are the replica's own",
    )
    suffer(system, case)


@pytest.mark.parametrize("moment", range(NUM_MOMENTS))
def test_any_process_at_a_random_moment(system: System, moment: int) -> None:
    """Whichever process of the system it is, of those in SURVIVED (driver, raylet, its agents: test_endings.py)."""
    draw = random.Random(SEED * 1000 + moment)
    processes = sorted((role, pid) for pid, (role, _) in system.processes().items() if role in SURVIVED)
    role, pid = draw.choice(processes)
    rule, delay_s = SURVIVED[role], draw.uniform(0, _LATEST_MOMENT_S)

    def inject(system: System, clients: Clients) -> Hurt:
        threading.Event().wait(delay_s)
        os.kill(pid, signal.SIGKILL)
        return Hurt(is_back=(lambda: another_of(role)(system, pid)) if rule.is_replaced_unnoticed else None)

    case = Case(
        id="random",
        injected=f"kill -9, moment {moment + 1}: {role}",
        inject=inject,
        is_noticed=rule.is_noticed,
        may_fail=rule.may_cut,
        may_cut=rule.may_cut,
    )
    suffer(system, case)


def test_drained_under_load(system: System) -> None:
    """T29: SIGTERM: what is under way is finished, what comes is told to go elsewhere; exit 0, nothing left."""
    with Clients(system.url, system.questions) as clients:
        until(lambda: clients.num_busy >= NUM_STREAMING // 2, 60)
        in_flight, hurt_s = clients.num_in_flight, time.monotonic()
        driver = end_driver(system, signal.SIGTERM)
        assert not psutil.wait_procs([driver], timeout=_DRAINED_S)[1]
        ended_s = time.monotonic() - hurt_s
        asked = clients.finish()
    count("T29", "SIGTERM, drain_time 20 s", asked, in_flight=in_flight, note=f"ended after {ended_s:.1f} s, exit 0")
    running = [one for one in asked if one.sent_s < hurt_s]
    assert {one.end for one in running} == {"answered"}, [one for one in running if one.end != "answered"]
    assert_told(asked, hurt_s)
    record = system.shell.record("tiny")
    assert (record.state, record.exit_code) == ("ended", 0)
    assert system.shell.run("down", "tiny").code == 0
    system.shell.assert_nothing_left()
