"""The arithmetic of `bench stream` on passes written by hand: which count, whose seconds, what is said of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from dist_infer.messages import PassRecord, TimelineReport, WorkerReport
from dist_infer.stream_figures import StreamRound, bound_by, measure_passes, median_round, round_figures, verdict
from offload.timeline import TimelineEvent
from partition.errors import ConfigError
from partition.plan import Plan


@dataclass(frozen=True)
class Rank:
    rank: int
    node: int = 0


@dataclass(frozen=True)
class FewFacts:
    """What the arithmetic reads of a plan."""

    ranks: tuple[Rank, ...]
    tensor: int = 1
    max_steps_in_flight: int = 1


def plan_of(*ranks: Rank, **changes: Any) -> Plan:
    return cast(Plan, FewFacts(ranks=ranks, **changes))


def record(step: int, tokens: int, end_s: float, *, sampled: int | None = None, **changes: Any) -> PassRecord:
    values = {"bytes_read": 100, "bytes_copied": 0, "stall_s": 0.5, "communication_s": 0.0, "compute_s": 0.4}
    return PassRecord(
        step_id=step,
        num_tokens=tokens,
        num_sampled=tokens if sampled is None else sampled,
        start_s=end_s - 0.95,
        end_s=end_s,
        **{**values, **changes},
    )


def report(rank: int, passes: list[PassRecord], events: tuple[TimelineEvent, ...] = ()) -> TimelineReport:
    return TimelineReport(rank=rank, epoch_s=1000.0, passes=tuple(passes), events=events, num_dropped=0)


def worker(rank: int, host: str = "a", pid: int = 1) -> WorkerReport:
    return WorkerReport(
        kernels="",
        rank=rank,
        host=host,
        pid=pid,
        num_kv_blocks=1,
        resident_bytes=0,
        slot_bytes=0,
        kv_bytes=0,
        rss_bytes=0,
        reader="threads",
        load_s=0.0,
    )


DECODES = [
    record(0, 8, 9.0, sampled=2, bytes_read=7777),  # the prompts
    record(1, 2, 11.0, bytes_read=999),  # only timed from
    record(2, 2, 12.0),
    record(3, 2, 13.0),
    record(4, 2, 15.0),
    record(5, 1, 30.0),  # one request is at its end
]


def test_only_passes_in_which_all_decode_count_and_not_the_first() -> None:
    """Guards against the prompt's slow pass, or the end's emptier ones, in the medians."""
    found = measure_passes(plan_of(Rank(0)), [report(0, DECODES)], [worker(0)], batch=2)
    assert (found.num_passes, found.tokens_per_pass, found.seconds_per_pass) == (3, 2.0, 4 / 3)
    assert found.node_bytes == {0: 100.0}
    one = round_figures(1, found, {0: 100.0})
    assert one.tokens_per_s == pytest.approx(1.5)
    assert one.percent_of_raw == pytest.approx(75.0)
    assert one.read_s == 1.0
    assert one.exposed_s == pytest.approx(1 / 3)


def test_too_few_alike_passes_say_what_to_change() -> None:
    with pytest.raises(ConfigError, match="--new-tokens"):
        measure_passes(plan_of(Rank(0)), [report(0, DECODES[:2])], [worker(0)], batch=2)


def test_nodes_have_a_disk_each_and_stages_of_one_process_take_turns() -> None:
    """Guards against counting one disk twice, and against half of the stalls where a process runs two stages."""
    plan = plan_of(Rank(0), Rank(1), Rank(2, node=1))
    reports = [report(rank, DECODES) for rank in range(3)]
    found = measure_passes(plan, reports, [worker(0), worker(1), worker(2, "b")], batch=2)
    assert found.node_bytes == {0: 200.0, 1: 100.0}
    assert (found.stall_s, found.compute_s) == (pytest.approx(1.0), pytest.approx(0.8))
    one = round_figures(1, found, {0: 400.0, 1: 100.0})
    assert one.raw_bytes_per_s == 500.0
    assert one.read_s == 1.0  # the slower node's


def test_stalls_are_per_unit_and_pass_and_of_counted_passes_alone() -> None:
    events = tuple(
        TimelineEvent("wait", unit, 0, end_s - 0.9, end_s - 0.9 + seconds)
        for end_s in (9.0, 11.0, 12.0, 13.0, 15.0)
        for unit, seconds in (("layers.0", 0.3), ("layers.1", 0.0))
    )
    found = measure_passes(plan_of(Rank(0)), [report(0, DECODES, events)], [worker(0)], batch=2)
    assert found.stall_s_per_unit == pytest.approx({"layers.0": 0.3, "layers.1": 0.0})
    (shown,) = found.ranks
    assert [one.step_id for one in shown.passes] == [2, 3, 4]
    assert shown.passes[0].start_s == pytest.approx(0.0)  # pictures begin at zero
    assert len(shown.events) == 6


def made(**changes: float | None) -> StreamRound:
    values: dict[str, Any] = {
        "number": 1,
        "num_passes": 5,
        "tokens_per_pass": 1.0,
        "tokens_per_s": 1.0,
        "seconds_per_pass": 1.0,
        "bytes_per_pass": 1e9,
        "copied_bytes_per_pass": 0.0,
        "bytes_per_s": 1e9,
        "raw_bytes_per_s": 1.03e9,
        "percent_of_raw": 97.0,
        "read_s": 0.97,
        "stall_s": 0.4,
        "compute_s": 0.55,
        "communication_s": 0.0,
        "exposed_s": 0.03,
    }
    return StreamRound(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "bound", "words"),
    [
        ({}, "disk", "disk-bound: reads run at 97 % of what this disk gives"),
        ({"read_s": 0.5, "compute_s": 0.98}, "compute", "compute-bound: computing takes 0.980 of 1.000 s"),
        ({"read_s": 0.6, "exposed_s": 0.4}, "disk", "neither is full"),
        ({"read_s": 0.2, "compute_s": 0.3, "communication_s": 0.5}, "network", "network-bound"),
        ({"percent_of_raw": None, "read_s": 0.0, "compute_s": 0.95}, "compute", "nothing is read from disk"),
        ({"percent_of_raw": None, "read_s": 0.0, "compute_s": 0.5, "stall_s": 0.0}, "compute", "nothing is read"),
    ],
)
def test_the_verdict_names_what_most_of_a_pass_goes_to(changes: dict[str, Any], bound: str, words: str) -> None:
    """A disk that stalls the loop for 40 % of the time is the bound, though computing takes longer than the stalls."""
    found = made(**changes)
    assert bound_by(found) == bound
    assert verdict(found, {"layers.3": 0.1}).startswith(words)


def test_an_unexplained_pass_names_the_units_waited_for() -> None:
    found = made(read_s=0.6, exposed_s=0.4)
    assert "layers.3, layers.9" in verdict(found, {"layers.9": 0.1, "layers.3": 0.2})


def test_medians_are_of_each_figure() -> None:
    middle = median_round([made(tokens_per_s=value, percent_of_raw=100 - value) for value in (3.0, 1.0, 9.0)])
    assert (middle.number, middle.tokens_per_s, middle.percent_of_raw) == (3, 3.0, 97.0)
