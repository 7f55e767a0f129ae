"""A Ray run ends as it should: interrupted, a rank killed, a damaged store, a deadline. Nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from demo_model import SMOLLM2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
MARK = "DIST_INFER_TEST_MARK"


class Run:
    """`dist-infer launch` as a shell starts it: its own process group, its children marked."""

    def __init__(self, file: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "launch", str(file), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, MARK: self.mark},
        )

    def until(self, marker: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if marker in line:
                return
        raise AssertionError(f"ended before {marker!r}:\n{self.text}")

    def finish(self, timeout_s: float) -> int:
        output, _ = self.process.communicate(timeout=timeout_s)
        self.lines.append(output)
        return self.process.returncode

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def living(self) -> list[psutil.Process]:
        """Processes of this run that are still there."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_nothing_left(self) -> None:
        deadline = time.monotonic() + 5  # the kernel takes a moment to reap what was killed
        while (living := self.living()) and time.monotonic() < deadline:
            psutil.wait_procs(living, timeout=0.2)
        assert not living, [process.cmdline() for process in living]


@pytest.fixture
def run_file(tmp_path: Path, store_root: Path) -> Path:
    return write_run(tmp_path, store_root)


def write_run(directory: Path, store: Path, **cluster: object) -> Path:
    file = directory / "run.yaml"
    config = {
        "model": {"path": SMOLLM2, "dtype": "bfloat16"},
        "parallel": {"tensor": 2, "pipeline": 2},
        "offload": {"store": str(store), "host_memory": "256 MiB"},
        "engine": {"max_requests": 4, "max_model_len": 512},
        "cluster": {"executor": "ray", "device": "cpu", **cluster},
        "run": {"kind": "generate", "max_tokens": 400, "prompts": ["Write a long story about the sea.", "Count."]},
    }
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture
def started() -> Iterator[list[Run]]:
    """Runs that a failing test leaves behind are killed."""
    runs: list[Run] = []
    yield runs
    for run in runs:
        for process in run.living():
            process.kill()


@pytest.mark.parametrize(
    ("marker", "fresh_store"), [("packing", True), ("starting workers", False), ("loading", False), ("[1]", False)]
)
def test_ctrl_c_ends_everything(
    marker: str, fresh_store: bool, run_file: Path, tmp_path: Path, started: list[Run]
) -> None:
    """FAULTS T28: exit 130 within 10 s, no process left, in every phase."""
    overrides = ("--set", f"offload.store={tmp_path / 'fresh'}") if fresh_store else ()
    run = Run(run_file, *overrides)
    started.append(run)
    run.until(marker)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    assert run.finish(10) == 130
    run.assert_nothing_left()


def test_a_killed_rank_ends_the_run_with_its_name(run_file: Path, started: list[Run]) -> None:
    """Where none may take its place: an error with exit code 4, not a hang."""
    run = Run(run_file, "--set", "cluster.max_restarts=0")
    started.append(run)
    run.until("ready")
    run.until("[1]")
    actors = [process for process in run.living() if any("RankActor" in part for part in process.cmdline())]
    assert len(actors) == 4
    actors[2].kill()
    assert run.finish(60) == 4
    assert "rank" in run.text
    assert "error:" in run.text
    run.assert_nothing_left()


def test_a_rank_that_raises_while_loading_ends_the_launch_with_its_error(tmp_path: Path, started: list[Run]) -> None:
    """FAULTS T06, T13: the worker's own words reach the user; one flipped bit never becomes an answer."""
    file = write_run(tmp_path, tmp_path / "stores")
    packed = Run(file, "--set", "run.max_tokens=1")
    started.append(packed)
    assert packed.finish(120) == 0, packed.text
    blob = next((tmp_path / "stores").rglob("embed.tp1.bin"))
    with blob.open("r+b") as handle:
        handle.seek(100_000)
        byte = handle.read(1)
        handle.seek(100_000)
        handle.write(bytes([byte[0] ^ 1]))
    run = Run(file)
    started.append(run)
    assert run.finish(120) == 4
    assert "embed" in run.text
    assert "damaged" in run.text
    assert "rank 1" in run.text
    run.assert_nothing_left()


def test_the_start_deadline_holds(tmp_path: Path, store_root: Path, started: list[Run]) -> None:
    """Workers that are not there in time end the launch with exit code 4."""
    run = Run(write_run(tmp_path, store_root, start_timeout="500 ms"))
    started.append(run)
    assert run.finish(90) == 4
    assert "before the deadline" in run.text
    run.assert_nothing_left()
