"""`dist-infer` as people run it, with a state directory of the test's own; what a run has started and left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch.runs.record import RunRecord, read_record

WriteRun = Callable[..., Path]
MARK = "DIST_INFER_TEST_MARK"
_COMMAND = [sys.executable, "-P", "-m", "launch.entry"]
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Shell:
    """Runs commands on runs. Everything that they start carries `mark`, and is killed by `close`."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.mark = directory.name + os.urandom(4).hex()
        self._directory = directory
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*_COMMAND, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=self._directory,
            env=self._environment(),
        )
        self._started.append(process)
        return process

    def run(self, *arguments: object, timeout_s: float = 150) -> Done:
        found = subprocess.run(
            [*_COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=self._directory,
            env=self._environment(),
            check=False,
        )
        return Done(found.returncode, found.stdout, found.stderr)

    def status(self, name: str) -> dict[str, Any]:
        done = self.run("status", name, "--json")
        assert done.code == 0, done.err
        found: dict[str, Any] = json.loads(done.out)
        return found

    def record(self, name: str) -> RunRecord:
        """What `status` reads, without a process for it."""
        (found,) = [read_record(path) for path in self.state.glob(f"dist-infer/*/{name}")]
        assert found is not None
        return found

    def ready(self, name: str) -> RunRecord:
        """As `record`, once the run has its URL there: it is written down just after it was printed."""
        until(lambda: self.record(name).state == "ready", 10)
        return self.record(name)

    def processes(self) -> list[psutil.Process]:
        """Of this test, the guardians excepted: they are nobody's."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def guardian(self, pid: int) -> psutil.Process:
        """Of the run with this pid."""
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if any(part.endswith("reap.py") for part in line) and str(pid) in line:
                return process
        raise AssertionError("no guardian")

    def assert_nothing_left(self, within_s: float = 10) -> None:
        """No process, no record, no file of this test's runs; at once or so."""
        deadline = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < deadline:
            psutil.wait_procs(left, timeout=0.2)
        assert not left, [process.cmdline() for process in left]
        assert list(self.state.glob("dist-infer/*/*")) == []

    def close(self) -> None:
        for process in self.processes():
            process.kill()
        for started in self._started:
            started.kill()
            started.wait(10)
            if started.stdout is not None:
                started.stdout.close()

    def _environment(self) -> dict[str, str]:
        paths = f"{_ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        return {**os.environ, MARK: self.mark, "XDG_STATE_HOME": str(self.state), "PYTHONPATH": paths}


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What it printed, to the line with this text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def until(what: Callable[[], bool], timeout_s: float) -> None:
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        pause.wait(0.1)
