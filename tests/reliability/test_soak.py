"""FAULTS T35: 70 % of what the run can do, for as long as one likes; kills, failing reads, clients that leave."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from named_runs import until
from reliability.clients import Asked, Clients
from reliability.figures import count
from reliability.injections import failing_reads
from reliability.suffering import assert_ends, assert_well
from reliability.system import READY_S, System
from reliability.watch import ReadyWatch

SOAK_S = float(os.environ.get("DIST_INFER_SOAK_S", "40"))
SEED = 35
_SHARE = 0.7
_MEASURED_S = 8.0
_MORE_MEMORY = 1.05
_QUIET_S = (5.0, 15.0)  # between injections
_FAILING_S = 5.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SOAK_S + 400)]


def pause(seconds: float) -> None:
    """How long something lasts; nothing is waited for."""
    threading.Event().wait(seconds)


def totals(system: System) -> tuple[dict[str, int], Counter[str], int]:
    """(bytes, descriptors by role, processes) of the run."""
    memory: Counter[str] = Counter()
    descriptors: Counter[str] = Counter()
    held = system.held().values()
    for one in held:
        memory[one.role] += one.rss_bytes
        descriptors[one.role] += one.num_descriptors
    return dict(memory), descriptors, len(held)


def measured_rate(system: System) -> float:
    """Answers a second when nobody waits between them."""
    with Clients(system.url, system.questions) as clients:
        until(lambda: clients.num_answered_since(0) > 16, 60)
        began_s, before = time.monotonic(), clients.num_answered_since(0)
        pause(_MEASURED_S)
        rate_per_s = (clients.num_answered_since(0) - before) / (time.monotonic() - began_s)
        assert_ends(clients.finish(), may_fail=False, may_cut=False)
    return rate_per_s


def kill_a_rank(system: System, watch: ReadyWatch, draw: random.Random) -> None:
    at_s = time.monotonic()
    system.rank(draw.randrange(4)).kill()
    watch.until(True, watch.until(False, at_s, 20), READY_S)


def test_soak(launch: Callable[..., System], streamed: dict[str, Any], tmp_path: Path) -> None:
    """T35: what was sent was answered or got an explicit error; memory grows by less than 5 %, descriptors do not."""
    system = launch({**streamed, "cluster": {**streamed["cluster"], "executor": "ray"}})
    rate_per_s = _SHARE * measured_rate(system)
    draw, kills, failures = random.Random(SEED), 0, 0
    with ReadyWatch(system.url) as watch:
        kill_a_rank(system, watch, draw)  # what a first replacement leaves for the next ones is no growth
        before = system.held()
        memory, descriptors, num_processes = totals(system)
        end_s = time.monotonic() + SOAK_S
        with Clients(system.url, system.questions, rate_per_s=rate_per_s, leave_every=5, seed=SEED) as clients:
            while time.monotonic() < end_s:
                pause(min(draw.uniform(*_QUIET_S), end_s - time.monotonic()))
                if kills <= failures:
                    kill_a_rank(system, watch, draw)
                    kills += 1
                else:
                    with failing_reads(system.rank(draw.randrange(4)), tmp_path):
                        pause(_FAILING_S)
                    failures += 1
            asked = clients.finish()
    load = f"{SOAK_S:g} s at {rate_per_s:.1f} requests/s (70 %)"
    injected = f"{load}: {kills} ranks killed, {failures} × EIO for {_FAILING_S:g} s, every fifth client leaves"
    figures = count("T35", injected, asked, in_flight=_most_in_flight(asked))
    assert_ends(asked, may_fail=True, may_cut=False)
    sent = sum(one.was_sent for one in asked)
    assert sent == figures.answered + figures.left + figures.errored
    assert figures.answered > sent / 2
    assert_well(system, before)
    now_memory, now_descriptors, now_processes = totals(system)
    assert now_processes <= num_processes + 1, system.processes()
    assert sum(now_memory.values()) < _MORE_MEMORY * sum(memory.values()), (memory, now_memory)
    assert sum(now_descriptors.values()) <= sum(descriptors.values()) + 16, (descriptors, now_descriptors)
    assert system.shell.run("down", "tiny").code == 0
    system.shell.assert_nothing_left()


def _most_in_flight(asked: list[Asked]) -> int:
    moments = sorted([(one.sent_s, 1) for one in asked] + [(one.end_s, -1) for one in asked])
    most = now = 0
    for _, change in moments:
        now += change
        most = max(most, now)
    return most
