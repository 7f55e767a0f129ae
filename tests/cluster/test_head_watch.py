"""When Ray itself counts as lost, without a Ray. With one: tests/system/test_ray_head.py, tests/namespaces."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from served_model import wait_until

from launch import head_watch
from launch.head_watch import Ask, Gone, HeadWatch
from partition.errors import ClusterError, ClusterGoneError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_INTERVAL_S", 0.01), ("_SILENT_S", 0.05)):
        monkeypatch.setattr(head_watch, name, seconds)


class Head:
    """Answers, is silent, or says what is gone."""

    def __init__(self) -> None:
        self.is_silent, self.is_anew, self.gone = False, False, ""

    def __call__(self, timeout_s: float) -> Gone | None:
        if self.is_anew:
            raise LookupError
        if self.is_silent:
            raise RuntimeError("Ray's own words")
        return Gone(self.gone, 8.0) if self.gone else None


@contextmanager
def watched(ask: Ask, *, patience_s: float = 60.0) -> Iterator[HeadWatch]:
    watch = HeadWatch(ask, is_ours=False, patience_s=patience_s)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


def test_a_head_that_comes_back_was_never_lost() -> None:
    """Guards a short cut of the network: who waits goes on."""
    head = Head()
    with watched(head) as watch:
        watch.wait_for_answer()  # it is there
        head.is_silent = True
        wait_until(lambda: watch.is_silent)
        waiting = threading.Thread(target=watch.wait_for_answer)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        head.is_silent = False
        waiting.join(10)
        assert not waiting.is_alive()
        assert not watch.is_lost
        watch.raise_if_lost()


def test_a_head_that_stays_silent_is_lost_for_good() -> None:
    """Guards requests that would end with Ray's end of the process: all who wait are told before."""
    head = Head()
    head.is_silent = True
    with watched(head, patience_s=0.2) as watch:
        wait_until(lambda: watch.is_silent)
        with pytest.raises(ClusterGoneError, match=r"has not answered for .* s\. .* then launch again"):
            watch.wait_for_answer()
        head.is_silent = False
        with pytest.raises(ClusterGoneError):
            watch.raise_if_lost()


def test_a_head_that_was_started_anew_does_not_know_this_node() -> None:
    """It may learn: one with a Redis reads it there."""
    head = Head()
    head.is_anew = True
    with watched(head, patience_s=0.2) as watch:
        assert not watch.is_lost
        wait_until(lambda: watch.is_lost)
        with pytest.raises(ClusterGoneError, match="has not known this node for"):
            watch.raise_if_lost()


def test_a_ray_of_our_own_is_looked_at_at_once_and_may_be_replaced() -> None:
    """Guards the order in which things are noticed: its ranks die with it, and their loss is told first."""
    head = Head()
    watch = HeadWatch(head, is_ours=True)  # not started: nobody looks in between
    assert not watch.is_lost
    head.gone = "its raylet (pid 4711) was killed by signal 9"
    assert watch.is_lost
    with pytest.raises(ClusterError, match="Ray is lost: its raylet") as caught:
        watch.raise_if_lost()
    assert not isinstance(caught.value, ClusterGoneError)


def test_stopping_ends_the_thread_and_tells_nothing() -> None:
    """Guards what is shut down on purpose from being taken for lost."""
    head = Head()
    with watched(head) as watch:
        watch.wait_for_answer()
    head.gone = "all of it"
    assert not any(thread.name == "dist-infer-head-watch" for thread in threading.enumerate())
    assert not watch.is_lost
