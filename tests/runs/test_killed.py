"""A killed driver leaves nothing that another launch would have to wait for; Ctrl-C in the phases of serving."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from named_runs import Shell, WriteRun, read_until, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LONG = {"prompt": "the sea", "max_tokens": 220, "ignore_eos": True, "temperature": 0, "n": 16, "stream": True}


def test_a_killed_driver(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """T07: all that it started is gone within 15 s, nobody having to ask for it, and a fresh launch works at once."""
    file = write_run(tmp_path)
    process = shell.start("launch", file)
    read_until(process, "serving")
    home = Path(str(shell.record("tiny").home))
    names = [process.cmdline()[0] for process in shell.processes()]
    assert {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= {name.strip() for name in names}  # they can be found
    process.kill()
    _, alive = psutil.wait_procs(shell.processes(), timeout=15)
    assert alive == []
    until(lambda: not home.exists(), 5)  # the guardian's last act, after the processes
    assert shell.record("tiny").state == "killed"
    # and once more, the guardian too, so that the agents of its Ray live on: the next launch ends them (T27)
    process.communicate()
    process = shell.start("launch", file)
    read_until(process, "serving")
    old = shell.processes()
    shell.guardian(process.pid).kill()
    process.kill()
    process.communicate()
    process = shell.start("launch", file)
    read_until(process, "serving")
    _, alive = psutil.wait_procs(old, timeout=1)
    assert alive == []
    old = shell.processes()
    shell.guardian(process.pid).kill()
    process.kill()
    process.communicate()
    done = shell.run("down", "tiny")
    assert (done.code, done.out) == (0, "tiny: was killed already; what it left is gone\n")
    shell.assert_nothing_left()


@pytest.mark.parametrize("phase", ["starting Ray Serve", "packing", "starting workers"])
def test_interrupted_before_it_serves(phase: str, shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """T28: exit 130 within 10 s, nothing left."""
    file = write_run(tmp_path, offload={"store": str(tmp_path / "fresh")})
    process = shell.start("launch", file)
    read_until(process, phase)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=15)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    shell.assert_nothing_left()


def test_interrupted_before_anything(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """T28: also while the command is still being imported."""
    process = shell.start("launch", write_run(tmp_path), "--set", "name=other")
    while not any("launch" in part for part in psutil.Process(process.pid).cmdline()):
        pass
    maps = Path(f"/proc/{process.pid}/maps")
    while "pydantic" not in maps.read_text():  # past the interpreter's own start, in ours
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=15)
    assert (process.returncode, text) == (130, "interrupted\n")
    shell.assert_nothing_left()


def test_interrupted_twice_while_draining(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """T28: the second Ctrl-C ends everything at once, the record included."""
    process = shell.start("launch", write_run(tmp_path))
    read_until(process, "serving")
    record = shell.ready("tiny")
    home = Path(str(record.home))
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(httpx.post, f"{record.url}/v1/completions", json=LONG, timeout=60)
        until(lambda: "dist_infer_http_open_answers 16" in httpx.get(f"{record.url}/metrics").text, 20)
        process.send_signal(signal.SIGTERM)
        read_until(process, "draining")
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # it waits for a moment; two signals at once would be one
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=15)
        assert process.returncode == 130
        assert isinstance(asked.exception(60), httpx.HTTPError)
    shell.assert_nothing_left()
    until(lambda: not home.exists(), 5)  # the guardian's last act, after the processes
