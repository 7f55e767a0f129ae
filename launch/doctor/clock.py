"""Clocks of the nodes. Only the coordinator keeps time: a difference harms no answer, but logs cannot be compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from launch.doctor.finding import Finding, ok, warning

_CHECK = "clock"
MOST_SKEW_S = 2.0


@dataclass(frozen=True, kw_only=True)
class ClockSample:
    """The coordinator's clock before and after asking, and what the node answered between; seconds since 1970."""

    node: str
    asked_s: float
    node_s: float
    answered_s: float

    @property
    def skew_s(self) -> float:
        """How much the node is ahead, if asking took as long as answering."""
        return self.node_s - (self.asked_s + self.answered_s) / 2

    @property
    def error_s(self) -> float:
        """By which `skew_s` may be wrong."""
        return (self.answered_s - self.asked_s) / 2


def judge_clocks(samples: Iterable[ClockSample]) -> list[Finding]:
    """Of several samples of a node the quickest counts."""
    best: dict[str, ClockSample] = {}
    for sample in samples:
        if sample.node not in best or sample.error_s < best[sample.node].error_s:
            best[sample.node] = sample
    return [_judge(sample) for sample in best.values()]


def _judge(sample: ClockSample) -> Finding:
    skew = f"{sample.skew_s:+.3f} s ± {sample.error_s:.3f} s from the coordinator's clock"
    if abs(sample.skew_s) - sample.error_s <= MOST_SKEW_S:
        return ok(_CHECK, sample.node, skew)
    return warning(
        _CHECK,
        sample.node,
        skew,
        why="nothing is decided by it, but times in this node's logs and traces do not fit the others', and TLS and "
        "tokens may be refused",
        do="run an NTP service there: `chronyc tracking` or `timedatectl` say whether one does",
    )
