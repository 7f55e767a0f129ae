"""Dead and silent ranks are found while nobody waits for them, and told once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dist_infer.heartbeat import Heartbeat
from partition.errors import ClusterError, WorkerError

WAIT_S = 20.0
SHORT_S = 0.05


class Ranks:
    """What each round finds: ranks that are late, or an error. The last one goes on for ever."""

    def __init__(self, *rounds: Sequence[int] | ClusterError) -> None:
        self.rounds = list(rounds)
        self.num_asked = 0
        self.losses: list[ClusterError] = []
        self.is_told, self.has_seen_all = threading.Event(), threading.Event()

    def ask(self, timeout_s: float) -> Sequence[int]:
        found = self.rounds[min(self.num_asked, len(self.rounds) - 1)]
        self.num_asked += 1
        if self.num_asked > len(self.rounds):
            self.has_seen_all.set()
        if isinstance(found, ClusterError):
            raise found
        return found

    def lost(self, ranks: Sequence[int]) -> ClusterError:
        return WorkerError(f"silent: {list(ranks)}", rank=ranks[0])

    def tell(self, error: ClusterError) -> None:
        self.losses.append(error)
        self.is_told.set()


def watched(ranks: Ranks) -> Heartbeat:
    heartbeat = Heartbeat(ranks.ask, ranks.lost, timeout_s=SHORT_S)
    heartbeat.start(ranks.tell)
    return heartbeat


def test_a_rank_that_misses_every_round_is_silent() -> None:
    ranks = Ranks([], [1, 2], [1])
    heartbeat = watched(ranks)
    assert ranks.is_told.wait(WAIT_S)
    heartbeat.stop()
    heartbeat.join()
    assert [str(error) for error in ranks.losses] == ["silent: [1]"]
    assert ranks.num_asked == 6  # five rounds in a row
    assert heartbeat.error is ranks.losses[0]


def test_a_rank_that_answers_now_and_then_is_there() -> None:
    """Guards slow ranks, and a coordinator that was stopped: rounds are counted, not seconds."""
    ranks = Ranks(*([[0]] * 4 + [[]]) * 3)
    heartbeat = watched(ranks)
    assert ranks.has_seen_all.wait(WAIT_S)
    heartbeat.stop()
    heartbeat.join()
    assert ranks.losses == []


def test_a_death_is_told_at_once_and_once() -> None:
    error = WorkerError("rank 3 died", rank=3)
    ranks = Ranks([], error)
    heartbeat = watched(ranks)
    assert ranks.is_told.wait(WAIT_S)
    heartbeat.stop()
    heartbeat.join()
    assert ranks.losses == [error]
    assert ranks.num_asked == 2


def test_what_is_found_after_the_stop_is_nobodys_affair() -> None:
    """Guards the end of an executor: its ranks go because they are sent away."""
    asked, may_answer = threading.Event(), threading.Event()

    def ask(timeout_s: float) -> Sequence[int]:
        asked.set()
        assert may_answer.wait(WAIT_S)
        raise WorkerError("rank 0 died", rank=0)

    losses: list[ClusterError] = []
    heartbeat = Heartbeat(ask, lambda ranks: WorkerError("silent", rank=0), timeout_s=SHORT_S)
    heartbeat.start(losses.append)
    assert asked.wait(WAIT_S)
    heartbeat.stop()
    may_answer.set()
    heartbeat.join()
    assert losses == []
    assert heartbeat.error is None
