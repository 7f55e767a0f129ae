"""`launch --detach` with the local executor: no Ray, so that it is quick."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from named_runs import Shell, WriteRun, read_until, until

pytestmark = pytest.mark.slow
SHORT = {"kind": "generate", "max_tokens": 4, "chat": False, "prompts": ["the sea"]}
LONG = {"kind": "generate", "max_tokens": 15000, "chat": False, "prompts": ["the sea"], "ignore_eos": True}
ROOM = {"max_model_len": 16000, "kv_memory": "64 MiB"}


def test_a_run_that_ends_by_itself(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """It outlives the command, its output is in its log, and how it ended is known until `down`."""
    file = write_run(tmp_path, run=SHORT)
    done = shell.run("launch", file, "--detach", "--json")
    assert done.code == 0, done.err
    assert '"state": "ready"' in done.out or '"state": "ended"' in done.out
    until(lambda: shell.record("tiny").state == "ended", 60)
    assert shell.status("tiny")["exit_code"] == 0
    assert "(length, 4 tokens)" in shell.run("logs", "tiny", "--follow").out
    refused = shell.run("logs", "tiny", "0")
    assert (refused.code, "no log of rank 0" in refused.err) == (2, True)
    assert shell.run("down", "tiny").code == 0
    shell.assert_nothing_left()


def test_a_start_that_fails_fails_here(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """Guards against a background process that dies unseen: its own error and exit code are the command's."""
    file = write_run(tmp_path, run=SHORT, engine={"max_model_len": 10_000_000})
    done = shell.run("launch", file, "--detach")
    assert done.code == 2
    assert "error:" in done.err
    assert "max_model_len" in done.err
    assert "Traceback" not in done.err
    found = shell.status("tiny")
    assert (found["state"], found["exit_code"], found["error"]) == ("failed", 2, done.err.split("error: ")[-1].strip())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_is_interrupted(number: signal.Signals, shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """T28: Ctrl-C while it waits ends what it has started, too."""
    process = shell.start("launch", write_run(tmp_path, run=LONG, engine=ROOM), "--detach")
    read_until(process, "starting workers")
    os.kill(process.pid, number)
    process.communicate(timeout=15)
    assert process.returncode == 130
    shell.assert_nothing_left()


def test_it_is_killed_before_it_is_ready(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """Guards against a command that waits for ever, or says that it runs: the signal is named, and nothing is left."""
    process = shell.start("launch", write_run(tmp_path, run=LONG, engine=ROOM), "--detach")
    read_until(process, "starting workers")
    shell.record("tiny").process.send(signal.SIGKILL)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 4, text
    assert "tiny was ended by signal 9 (Killed) before it was ready" in text
    shell.assert_nothing_left()


def test_it_is_ended_before_it_is_ready(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """Guards against a command that calls a run ready which somebody has ended, as `down` does."""
    process = shell.start("launch", write_run(tmp_path, run=LONG, engine=ROOM), "--detach")
    read_until(process, "starting workers")
    shell.record("tiny").process.send(signal.SIGINT)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 130, text
    assert "tiny was ended before it was ready" in text
    assert shell.status("tiny")["state"] == "ended"
    assert shell.run("down", "tiny").code == 0
    shell.assert_nothing_left()


def test_down_ends_what_runs(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """A second launch of the name is refused meanwhile (T25), drain says that there is nothing to drain."""
    file = write_run(tmp_path, run=LONG, engine=ROOM)
    assert shell.run("launch", file, "--detach").code == 0
    found = shell.status("tiny")
    assert found["state"] == "ready"
    for arguments in (("launch", file), ("launch", file, "--detach")):
        refused = shell.run(*arguments)
        assert refused.code == 2
        assert f"pid {found['pid']}" in refused.err
    drained = shell.run("drain", "tiny")
    assert (drained.code, "nothing to drain" in drained.err) == (2, True)
    assert shell.status("tiny") == found
    done = shell.run("down", "tiny")
    assert (done.code, done.out) == (0, "tiny: ended\n")
    shell.assert_nothing_left()
    assert shell.run("down", "tiny").code == 0
