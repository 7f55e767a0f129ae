"""What Ray would do to the process that starts it, and does not."""

from __future__ import annotations

import logging

import pytest
from ray._private import worker

from launch.ray_start import keep_standard_output


def test_what_ray_has_to_tell_is_not_printed_among_the_answers(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `launch --json`: a node that is lost while it answers must not make its output unreadable."""
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # as it was, after this test
    keep_standard_output()
    caplog.set_level(logging.WARNING, "launch.ray_start")
    lost = "Raylet is terminated. Possible reasons: (1) x. Last 20 lines of the Raylet logs:\n    [state-dump] x"
    worker.print_to_stdstream({"lines": [lost], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert caplog.messages == ["Ray: Raylet is terminated"]
    assert capfd.readouterr().out == ""
