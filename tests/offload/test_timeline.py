"""The timeline notes what really happened, keeps the newest, and says what it lost."""

from __future__ import annotations

import threading

from offload.timeline import Timeline


def test_compute_follows_the_wait_without_a_gap() -> None:
    """Guards the lanes: a stalled and a computing thread are the same thread."""
    timeline = Timeline()
    timeline.waited("u", 1, 0.0)
    timeline.end_compute("u", 1, 7)
    timeline.begin_compute()
    timeline.end_compute("v", -1, 8)
    (wait, first, second), _ = timeline.drain()
    assert wait.end_s == first.start_s
    assert first.end_s <= second.start_s
    assert [(event.kind, event.unit, event.slot) for event in (first, second)] == [
        ("compute", "u", 1),
        ("compute", "v", -1),
    ]


def test_the_newest_are_kept_and_the_lost_are_counted() -> None:
    """Guards the bound on memory of a server that is recorded for days, from several threads."""
    timeline = Timeline(capacity=8)
    threads = [
        threading.Thread(target=lambda: [timeline.add("read", str(i), 0, 0.0) for i in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    events, num_dropped = timeline.drain()
    assert (len(events), num_dropped) == (8, 192)
    assert events[-1].unit == "49"
    assert timeline.drain() == ((), 0)
