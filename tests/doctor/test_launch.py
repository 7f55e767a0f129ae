"""Preflight: what a launch does with what the doctor finds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(content: Mapping[str, Any], tmp_path: Path) -> Launch:
    """launch("--flag", section={…}) in a process of its own, as it leaves settings for Ray in its environment."""

    def run(*flags: str, **sections: Any) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({**content, **sections}))
        return subprocess.run(
            [sys.executable, "-P", "-m", "launch.cli", "launch", str(file), *flags],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")},
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def in_memory() -> Iterator[str]:
    """A store on a tmpfs, which is a warning."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield directory


def test_an_error_ends_the_launch_before_anything_starts(launch: Launch, tmp_path: Path) -> None:
    """One line with what to do and the exit code of the error; no Ray, no store."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = launch(run={"kind": "serve", "port": port})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [text for text in done.stderr.splitlines() if text]
    assert line.startswith("error: ")
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "choose another run.port" in line
    assert not (tmp_path / "stores").exists()


def test_a_warning_is_shown_and_ends_nothing(launch: Launch, in_memory: str) -> None:
    """The launch goes on, here until it asks for the tokenizer that the tiny model has not."""
    run = {"kind": "generate", "prompts": ["a"], "chat": False}
    done = launch(run=run, offload={"store": in_memory})
    assert done.returncode == 2
    assert "tokenizer" in done.stderr.splitlines()[-1]
    assert "warning: disk: " in done.stderr
    assert "offload.store is in memory" in done.stderr
    assert "\n  why: " in done.stderr
    assert "\n  do: set offload.store" in done.stderr
    assert list(Path(in_memory).rglob("manifest.json"))
    done = launch("--no-preflight", run=run, offload={"store": in_memory})
    assert done.returncode == 2
    assert "tokenizer" in done.stderr.splitlines()[-1]
    assert "warning" not in done.stderr
