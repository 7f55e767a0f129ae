"""Many launches at once, each in a process of its own and several in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from named_runs import Shell, WriteRun, read_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ONE_AFTER_THE_OTHER = """
import os, sys
from pathlib import Path
from dist_infer import load_config
from dist_infer.config import ClusterConfig
from launch.backend import RayBackend
from launch.runs.announce import Announcer
from launch.runs.run import Run

import ray

def start():
    backend = RayBackend(ClusterConfig(executor="ray"), "tiny")
    backend.start(1)
    backend.close()

file = Path(sys.argv[1])
for _ in range(2):
    with Run(load_config(file), file, Announcer(None, None)):
        start()
start()
print("started", flush=True)
"""


def test_eight_launches_of_two_names(shell: Shell, write_run: WriteRun, tmp_path: Path) -> None:
    """T26: one of each name serves, the others name it; their ports do not collide, and one that is taken is named."""
    file = write_run(tmp_path)
    names = ["one", "two"] * 4
    commands = [shell.start("launch", file, "--set", f"name={name}") for name in names]
    refused = 0
    for name, command in zip(names, commands, strict=True):
        text = _until_serving_or_ended(command)
        if "serving" not in text:
            refused += 1
            assert command.wait(10) == 2, text
            assert re.search(rf"a run named {name} is there already: (pid \d+|it is being started)", text), text
    assert refused == 6
    urls = [str(shell.ready(name).url) for name in ("one", "two")]
    assert len(set(urls)) == 2
    port = urls[0].rpartition(":")[2]
    done = shell.run("launch", file, "--set", "name=three", "--set", f"run.port={port}")
    assert done.code == 2, done.err
    assert port in done.err
    assert shell.status("one")["state"] == "ready"
    for name in ("one", "two"):
        assert shell.run("down", name, "--now").out == f"{name}: ended\n"
    assert shell.run("down", "three").code == 0
    shell.assert_nothing_left()


def _until_serving_or_ended(command: subprocess.Popen[str]) -> str:
    try:
        return read_until(command, "serving")
    except AssertionError as error:
        return str(error)


def test_runs_one_after_the_other_in_one_process(write_run: WriteRun, tmp_path: Path) -> None:
    """Guards against a token, or a directory, that Ray keeps from the run before: they are gone with it."""
    file = write_run(tmp_path, cluster={"executor": "ray"})
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, str(file)],
        capture_output=True,
        text=True,
        timeout=150,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr
