"""The timeline notes what really happened, keeps the newest, and says what it lost."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from offload.timeline import Timeline


def test_a_read_begins_after_what_had_to_happen_first() -> None:
    """Guards against counting the wait for a slot's copy, or for other reads, as reading."""
    timeline, order = Timeline(), []
    future: Future[int] = Future()
    reading = timeline.reading("layers.0", 2, 4096, lambda: order.append("before"))
    future.add_done_callback(reading.end)
    reading.begin()
    assert order == ["before"]
    future.set_result(4096)
    ((event,), num_dropped) = timeline.drain()
    assert (event.kind, event.unit, event.slot, event.num_bytes, num_dropped) == ("read", "layers.0", 2, 4096, 0)
    assert event.start_s <= event.end_s


def test_reads_that_did_not_bring_their_bytes_leave_no_event() -> None:
    """Guards against a failed or cancelled read that looks like a fast one; and end() must not raise in a callback."""
    timeline = Timeline()
    failed: Future[int] = Future()
    reading = timeline.reading("a", 0, 1, None)
    failed.add_done_callback(reading.end)
    reading.begin()
    failed.set_exception(OSError("disk"))
    cancelled: Future[int] = Future()
    cancelled.add_done_callback(timeline.reading("b", 0, 1, None).end)
    cancelled.cancel()
    assert timeline.drain() == ((), 0)


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
