"""How often ranks are replaced, and what is known of it meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dist_infer.config import ClusterConfig
from dist_infer.engine.fake_executor import FakeExecutor
from dist_infer.engine.scheduler import SchedulerConfig
from dist_infer.gang_state import (
    Connecting,
    Degraded,
    Draining,
    Failed,
    GangState,
    Loading,
    Packing,
    Placing,
    Ready,
    Step,
    WarmingUp,
    describe,
)
from dist_infer.messages import decode, encode
from dist_infer.supervisor import Supervisor
from partition.errors import BudgetError, ClusterError, WorkerError

LOSS = WorkerError("rank 1 died", rank=1)
CONFIG = SchedulerConfig(
    num_kv_blocks=8,
    block_tokens=4,
    max_batch_tokens=8,
    max_micro_batches=1,
    max_requests=4,
    max_model_len=32,
    max_steps_in_flight=1,
)


class Gang:
    """Replaced as the script has it: an error, or what it costs."""

    def __init__(self, *script: Exception | str) -> None:
        self.script = list(script)
        self.epochs: list[int] = []
        self.seen: list[GangState] = []
        self.is_stopped = False
        self.supervisor: Supervisor | None = None
        self.scheduler_config = CONFIG
        self.step_timeout_s = 30.0
        self.executor = FakeExecutor(num_kv_blocks=8, block_tokens=4)

    def replace(self, epoch: int) -> str:
        self.epochs.append(epoch)
        assert self.supervisor is not None
        self.supervisor.note(Loading(done=1, total=4))
        self.seen.append(self.supervisor.state)
        found = self.script.pop(0) if self.script else ""
        if isinstance(found, Exception):
            raise found
        if found:
            self.scheduler_config = replace(CONFIG, num_kv_blocks=4)
        self.executor = FakeExecutor(num_kv_blocks=8, block_tokens=4, epoch=epoch)
        return found

    def stop(self) -> None:
        self.is_stopped = True


def supervise(gang: Gang, now: list[float], **cluster: Any) -> Supervisor:
    def nobody(step: Step) -> None:
        pass

    made = Supervisor(ClusterConfig(**cluster), nobody, clock=lambda: now[0], wall_clock=lambda: 1000.0 + now[0])
    gang.supervisor = made
    made.look_after(gang)
    return made


def test_others_take_the_place_of_lost_ranks_under_a_later_epoch() -> None:
    """Guards the fence: no two gangs have the same number. Scheduling changes only where the plan does."""
    gang = Gang("", "without node-2: half as fast")
    supervisor = supervise(gang, [5.0])
    first = supervisor(LOSS)
    assert (first.epoch, first.executor, first.scheduler) == (1, gang.executor, None)
    assert supervisor.state == Ready(epoch=1)
    second = supervisor(LOSS)
    assert (second.epoch, second.scheduler) == (2, gang.scheduler_config)
    assert supervisor.state == Ready(epoch=2, note="without node-2: half as fast")
    wanted = Degraded(cause="rank 1 died", since_s=1005.0, attempt=1, step=Loading(done=1, total=4))
    assert gang.seen == [wanted, wanted]


def test_a_gang_that_is_lost_while_it_starts_costs_an_attempt() -> None:
    gang = Gang(ClusterError("rank 0 never came"), WorkerError("rank 2 died", rank=2))
    supervisor = supervise(gang, [0.0], max_restarts=3)
    assert supervisor(LOSS).epoch == 3
    assert [(state.cause, state.attempt) for state in gang.seen if isinstance(state, Degraded)] == [
        ("rank 1 died", 1),
        ("rank 0 never came", 2),
        ("rank 2 died", 3),
    ]
    with pytest.raises(ClusterError, match=r"3 gangs were started within 600 s and lost.*cluster\.max_restarts"):
        supervisor(LOSS)
    assert supervisor.state == Failed(cause="rank 1 died")


def test_attempts_count_within_the_window_alone() -> None:
    gang, now = Gang(), [0.0]
    supervisor = supervise(gang, now, max_restarts=2, restart_window=100)
    for at, epoch in ((0.0, 1), (60.0, 2), (100.0, 3), (160.0, 4)):
        now[0] = at
        assert supervisor(LOSS).epoch == epoch
    now[0] = 199.0
    with pytest.raises(ClusterError, match="2 gangs were started within 100 s"):
        supervisor(LOSS)


def test_none_means_none() -> None:
    gang = Gang()
    supervisor = supervise(gang, [0.0], max_restarts=0)
    with pytest.raises(ClusterError, match=r"cluster\.max_restarts: 0"):
        supervisor(LOSS)
    assert gang.epochs == []


def test_what_the_planner_refuses_is_not_tried_again() -> None:
    """Guards its words: what is needed and what is there."""
    gang = Gang(BudgetError("stage 0 needs 3 GiB, node-1 has 2 GiB"))
    supervisor = supervise(gang, [0.0])
    with pytest.raises(BudgetError, match="needs 3 GiB"):
        supervisor(LOSS)
    assert gang.epochs == [1]
    assert supervisor.state == Failed(cause="stage 0 needs 3 GiB, node-1 has 2 GiB")


def test_cancel_ends_what_is_being_started_and_starts_no_more() -> None:
    class Cancelled(Gang):
        def replace(self, epoch: int) -> str:
            assert self.supervisor is not None
            self.supervisor.cancel()
            assert self.is_stopped
            raise ClusterError("the executor was closed")

    gang = Cancelled()
    supervisor = supervise(gang, [0.0])
    for _ in range(2):
        with pytest.raises(ClusterError, match="is being closed"):
            supervisor(LOSS)
    assert supervisor.state == Draining()


def test_steps_of_the_first_start_are_told_and_later_ones_only_shown() -> None:
    """Guards the display of a launch, which has ended when a gang is replaced."""
    told: list[Step] = []
    gang = Gang()
    supervisor = gang.supervisor = Supervisor(ClusterConfig(), told.append)
    steps: list[Step] = [Packing(done=0, total=3), Placing(), Connecting(), Loading(done=1, total=2), WarmingUp()]
    for step in steps:
        supervisor.note(step)
        assert supervisor.state == step
    supervisor.look_after(gang)
    supervisor(LOSS)
    assert told == steps
    supervisor.drain()
    supervisor.note(Placing())
    assert supervisor.state == Draining()


def test_states_have_words_and_cross_processes() -> None:
    state = Degraded(cause="rank 1 died", since_s=1.0, attempt=2, step=Loading(done=1, total=4))
    assert describe(state) == "degraded: rank 1 died; attempt 2 to replace the ranks, loading 1 of 4"
    assert decode(Degraded, encode(state)) == state
    assert describe(Ready(note="slower")) == "ready (slower)"
    assert {describe(state) for state in (Placing(), Connecting(), WarmingUp(), Draining(), Failed(cause="x"))} == {
        "starting workers",
        "connecting",
        "warming up",
        "draining",
        "failed: x",
    }
