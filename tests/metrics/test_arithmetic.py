"""Histograms, windows and what is told of requests: pure arithmetic, without a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_infer.messages import StreamReport, WorkerReport
from dist_infer.metrics.histogram import SECONDS, Histogram, quantile
from dist_infer.metrics.rank_watch import Ranks, RankWatch
from dist_infer.metrics.request_times import AnswerTimes, RequestHistograms
from dist_infer.metrics.window import WINDOW_S, WorkWindow
from dist_infer.outputs import CompletionOutput, Event, Finished, RequestMetrics, RequestOutput, TokenEvent
from dist_infer.summary import difference


@given(st.lists(st.floats(0, 1e4), max_size=50))
def test_buckets_hold_every_value_once(values: list[float]) -> None:
    """Guards bounds that are inclusive, and the last bucket, which has everything."""
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.add(value)
    for bound, total in histogram.buckets():
        assert total == sum(value <= bound for value in values)
    assert histogram.buckets()[-1] == (math.inf, len(values))
    assert histogram.sum == pytest.approx(sum(values))


@given(st.lists(st.floats(1e-4, 500), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantile_is_in_the_right_bucket(values: list[float], share: float) -> None:
    """Guards percentiles in `top`: no farther off than the bucket is wide."""
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.add(value)
    exact = sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
    high = next(bound for bound in SECONDS if bound >= exact)
    low = max((bound for bound in SECONDS if bound < exact), default=0.0)
    found = quantile(histogram.buckets(), share)
    assert found is not None
    assert low <= found <= high


def test_quantile_of_nothing_and_of_too_much() -> None:
    """Guards an interval without requests, and values beyond the last bound, where only the bound is known."""
    assert quantile(Histogram(SECONDS).buckets(), 0.5) is None
    assert quantile([], 0.5) is None
    histogram = Histogram(SECONDS)
    histogram.add(1e6)
    assert quantile(histogram.buckets(), 0.5) == SECONDS[-1]


def token(index: int, num_tokens: int = 1) -> TokenEvent:
    return TokenEvent(request_id="r", index=index, token_ids=(7,) * num_tokens, text="x", logprobs=None)


def finished(num_tokens: int, *, scheduled_s: float | None = 2.0) -> Finished:
    answer = CompletionOutput(
        index=0, text="x", token_ids=[7] * num_tokens, finish_reason="stop", stop_reason=None, logprobs=None
    )
    metrics = RequestMetrics(
        arrival_s=1.5,
        first_scheduled_s=scheduled_s,
        first_token_s=None,
        finished_s=None,
        num_generated_tokens=num_tokens,
        num_preemptions=0,
    )
    output = RequestOutput(
        request_id="r", prompt="p", prompt_token_ids=[1, 2, 3], outputs=[answer], finished=True, metrics=metrics
    )
    return Finished(request_id="r", reason="stop", stop_reason=None, output=output)


def test_times_of_two_prompts() -> None:
    """Guards who counts when: the first token of each prompt, gaps within each answer, and its end."""
    found = RequestHistograms()
    times = AnswerTimes(found, 1.0)
    steps: list[tuple[float, list[tuple[int, Event]]]] = [
        (1.25, [(0, token(0))]),
        (1.5, [(0, token(1)), (1, token(0))]),  # a second answer's first token is nobody's first, and no gap
        (2.0, [(0, token(0, 3))]),  # three tokens in 0.75 s
        (2.5, [(0, token(1)), (0, token(0, 0))]),  # text without a token says nothing
        (4.0, [(0, finished(4)), (1, finished(1, scheduled_s=None))]),
    ]
    for now_s, events in steps:
        times.take(events, now_s)
    assert times.ttft_s == 0.25
    assert (found.ttft.buckets()[-1][1], found.ttft.sum) == (2, 0.75)
    assert (found.inter_token.buckets()[-1][1], found.inter_token.sum) == (4, 1.75)
    assert (found.whole.buckets()[-1][1], found.whole.sum) == (2, 6.0)
    assert (found.queue.buckets()[-1][1], found.queue.sum) == (1, 0.5)
    assert (found.prompt_tokens.sum, found.output_tokens.sum) == (6, 5)


def test_an_answer_that_comes_at_once_has_a_first_token() -> None:
    """Guards TTFT where tokens are only seen at the end; an answer without tokens has none."""
    found = RequestHistograms()
    AnswerTimes(found, 1.0).take([(0, finished(4)), (1, finished(0))], 3.0)
    assert (found.ttft.buckets()[-1][1], found.ttft.sum) == (1, 2.0)


def test_window_goes_from_work_to_work() -> None:
    """Guards slow passes: busy seconds come at once when a pass ends, and readings between mean nothing."""
    window: WorkWindow[str] = WorkWindow()
    window.add(0.0, 0.0, "start")
    assert window.span(5.0) is None
    window.add(30.0, 29.0, "first pass")
    assert window.span(30.0) == ("start", "first pass")
    window.add(45.0, 29.0, "between")
    assert window.span(45.0) == ("start", "first pass")
    window.add(60.0, 58.0, "second pass")
    assert window.span(60.0) == ("first pass", "second pass")
    assert window.span(60.0 + 30.0 + WINDOW_S) == ("first pass", "second pass")
    assert window.span(60.1 + 30.0 + WINDOW_S) is None  # idle


def test_window_is_ten_seconds_of_quick_passes() -> None:
    """Guards the length: nothing older than what began ten seconds ago."""
    window: WorkWindow[int] = WorkWindow()
    for second in range(100):
        window.add(float(second), float(second), second)
    assert window.span(99.0) == (89, 99)
    window.add(100.0, 1.0, -1)  # begun anew
    assert window.span(100.0) is None


def test_a_rank_that_was_replaced_counts_since_it_began() -> None:
    """Guards a run's figures against counts that went back."""
    before = StreamReport(0, 9, 100, 0, 1.0, 4.0, 0.0, 3.0, 50)
    after = StreamReport(0, 2, 20, 0, 0.5, 1.0, 0.0, 0.5, 7)
    assert difference(before, after) == after
    assert difference(after, before).num_passes == 7


class Scripted:
    """Ranks with the reports they are given."""

    def __init__(self) -> None:
        self.plan: Any = type("OneRank", (), {"ranks": (object(),)})()
        self.worker_reports: tuple[WorkerReport, ...] = (worker(1),)
        self.busy_s, self.num_asked = 0.0, 0

    def stream_reports(self) -> tuple[StreamReport, ...]:
        self.num_asked += 1
        return (StreamReport(0, int(self.busy_s), 100, 0, self.busy_s / 4, self.busy_s, 0.0, self.busy_s * 3 / 4, 5),)


def worker(pid: int) -> WorkerReport:
    return WorkerReport(0, "host", pid, 1, 0, 0, 0, 0, "threads", "", 0.0)


def test_watch_takes_differences_within_a_gang() -> None:
    """Guards the window over a replaced gang: its counts begin at nothing."""
    now, ranks = [0.0], Scripted()
    assert isinstance(ranks, Ranks)
    watch = RankWatch(ranks, clock=lambda: now[0])
    assert watch.is_due
    for second, busy_s in ((1, 4.0), (2, 5.0), (20, 9.0)):
        now[0], ranks.busy_s = float(second), busy_s
        watch.read()
    assert not watch.is_due
    assert watch.last is not None
    assert (watch.last.reports[0].busy_s, watch.last.spent[0].busy_s) == (9.0, 4.0)
    now[0], ranks.busy_s, ranks.worker_reports = 21.0, 2.0, (worker(2),)
    watch.read()
    assert (watch.last.spent[0].busy_s, watch.last.spent[0].stall_s) == (2.0, 0.5)
    now[0] = 60.0
    watch.read()
    assert watch.last.spent[0].busy_s == 0.0
