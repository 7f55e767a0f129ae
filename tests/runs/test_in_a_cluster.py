"""A run in a Ray cluster that was there before it and stays: what a killed driver leaves there is found and removed."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from named_runs import MARK, Shell, WriteRun, read_until, until

from dist_infer import load_config
from launch.runs.announce import Announcer
from launch.runs.place import private_directory, run_directory
from launch.runs.record import write_record
from launch.runs.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LONG = {"prompt": "the sea", "max_tokens": 220, "ignore_eos": True, "temperature": 0, "n": 16, "stream": True}
START = """
import ray, sys
context = ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR")
print("at", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
LEFT = """
import ray, sys
from ray import serve
from ray.util.placement_group import placement_group_table
from launch.runs.cluster import read_worker_log
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
groups = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
offsets = {}
texts = [text for _ in range(2) for _, text in read_worker_log(sys.argv[1], sys.argv[2], False, offsets)]
print(len(serve.status().applications), len(groups), len(texts))
"""


@pytest.fixture
def address(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a Ray on this machine, with a token."""
    for name, value in (("RAY_AUTH_MODE", "token"), ("RAY_AUTH_TOKEN", secrets.token_hex(32))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv(MARK, shell.mark)
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen([sys.executable, "-c", START], stdin=pipe, stdout=pipe, stderr=both, text=True)
    yield read_until(process, "at ").splitlines()[-1].split()[1]
    process.communicate()


def left(address: str, label: str) -> list[int]:
    """Applications, placement groups, logs of rank 0 that are read with text in them."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT, address, f"{label}: rank 0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_a_killed_driver(address: str, shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """T07, T27: Serve keeps the endpoint; the name stays known, in the cluster too, until `down` removes all of it."""
    file = write_run(tmp_path, cluster={"executor": "ray", "address": address})
    process = shell.start("launch", file)
    read_until(process, "serving")
    record = shell.record("tiny")
    label = f"tiny-{record.run_id[:8]}"
    assert "rank 0" in shell.run("logs", "tiny", "0").out
    process.kill()
    process.communicate()
    assert left(address, label) == [1, 1, 1]
    (directory,) = shell.state.glob("dist-infer/*/tiny")
    directory.rename(tmp_path / "elsewhere")  # as if it had been launched on another machine
    refused = shell.run("launch", file)
    assert (refused.code, f"as the application {label}" in refused.err) == (2, True)
    assert shell.run("down", "tiny").code == 0, "of the refused one, which leaves the other alone"
    assert left(address, label)[:2] == [1, 1]
    (tmp_path / "elsewhere").rename(directory)
    done = shell.run("down", "tiny")
    assert (done.code, done.out) == (0, "tiny: was killed already; what it left is gone\n")
    assert left(address, label)[:2] == [0, 0]


def test_ended_by_force(address: str, shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """T28: the second Ctrl-C cannot clear up in the cluster; it says who does, and the name stays known until then.

    A run that ends in order leaves nothing either.
    """
    file = write_run(tmp_path, cluster={"executor": "ray", "address": address})
    process = shell.start("launch", file)
    read_until(process, "serving")
    record = shell.ready("tiny")
    label = f"tiny-{record.run_id[:8]}"
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(httpx.post, f"{record.url}/v1/completions", json=LONG, timeout=60)
        until(lambda: "dist_infer_http_open_answers 16" in httpx.get(f"{record.url}/metrics").text, 20)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # it waits for a moment; two signals at once would be one
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=15)
        assert (process.returncode, "`dist-infer down tiny`" in text) == (130, True), text
        assert shell.status("tiny")["state"] == "killed"
        assert asked.result(60).status_code == 200, "Serve keeps the endpoint"
    assert shell.run("down", "tiny").code == 0
    assert left(address, label)[:2] == [0, 0]
    assert list(shell.state.glob("dist-infer/*/*")) == []
    done = shell.run("launch", file, "--detach")
    assert done.code == 0, done.err
    label = f"tiny-{shell.record('tiny').run_id[:8]}"
    assert shell.run("down", "tiny").out == "tiny: ended\n"
    assert left(address, label)[:2] == [0, 0]


def test_a_cluster_that_does_not_answer(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """Guards `down` against forgetting what it could not clear up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(shell.state))
        file = write_run(tmp_path, cluster={"executor": "ray", "address": "127.0.0.1:1"})
        with Run(load_config(file), file, Announcer(None, None)) as run:
            dead = replace(run.record, process=replace(run.record.process, start_ticks=1))
        write_record(private_directory(run_directory("tiny")), dead)
    done = shell.run("down", "tiny")
    assert done.code == 4
    assert "127.0.0.1:1" in done.err
    assert "--now if it is gone for good" in done.err
    assert shell.status("tiny")["state"] == "killed"
    assert shell.run("down", "tiny", "--now").code == 0
    assert shell.run("down", "tiny").out == "tiny: nothing is there\n"
