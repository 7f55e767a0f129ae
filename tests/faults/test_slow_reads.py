"""FAULTS T34: a disk that hangs for 200 ms now and then slows a run down, and that is all it does."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_slow_reads_change_no_token_and_kill_nothing(serving, injected):
    """Every 50th read of each reader thread takes 200 ms longer; a step has five seconds, and none takes them."""
    serving.open(engine={"step_timeout": "5 s"})
    with injected(serving.process.pid, "delay_enter=200000:when=50+50") as strace:
        answer = serving.generate(120)
    assert strace.num_injected >= 2
    assert answer["tokens"] == serving.golden
    assert answer["num_read_retries"] == 0
    assert answer["num_slow_reads"] >= 1
