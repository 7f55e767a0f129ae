"""Clocks that differ: what counts is more than asking can explain."""

from __future__ import annotations

from launch.doctor.clock import ClockSample, judge_clocks


def sample(node: str, ahead_s: float, round_trip_s: float) -> ClockSample:
    return ClockSample(
        node=node, asked_s=1000.0, node_s=1000.0 + round_trip_s / 2 + ahead_s, answered_s=1000.0 + round_trip_s
    )


def test_a_clock_that_is_off_is_a_warning_and_no_error() -> None:
    """FAULTS T05: only the coordinator keeps time, so a run goes on."""
    near, ahead, behind = judge_clocks([sample("a", 1.9, 0.01), sample("b", 20, 0.01), sample("c", -2.5, 0.01)])
    assert [near.severity, ahead.severity, behind.severity] == ["ok", "warning", "warning"]
    assert (ahead.where, ahead.exit_code) == ("b", 0)
    assert ahead.what.startswith("+20.000 s")
    assert behind.what.startswith("-2.500 s")


def test_the_quickest_answer_counts() -> None:
    """A worker that was just started answers late, which is not skew."""
    (finding,) = judge_clocks([sample("a", 0.0, 9.0), sample("a", 0.1, 0.01), sample("a", 3.0, 4.0)])
    assert finding.severity == "ok"
    assert finding.what.startswith("+0.100 s ± 0.005 s")


def test_what_a_slow_answer_explains_is_no_skew() -> None:
    (finding,) = judge_clocks([sample("a", 3.0, 4.0)])
    assert finding.severity == "ok"
