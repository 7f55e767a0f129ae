"""A launched run that serves, as a whole: its processes by what they are, what they hold, whether it is well."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from named_runs import Shell
from reliability.clients import Question

from dist_infer.metrics.scraped import Scraped, read_scrape

READY_S = 60.0
_ROLES = {
    "ServeReplica": "replica",
    "ServeController": "controller",
    "RankActor": "rank",
    "dist_infer.worker.child": "rank",
    "template_process": "templates",
    "grammar_process": "grammars",
    "gcs_server": "gcs",
    "raylet/raylet": "raylet",
    "dashboard/agent.py": "agent",
    "DashboardAgent": "agent",
    "RuntimeEnvAgent": "environments",
    "runtime_env/agent": "environments",
    "dashboard.py": "dashboard",
    "log_monitor": "log monitor",
    "monitor.py": "monitor",
    "ray::IDLE": "idle worker",
    "default_worker.py": "worker",
}


@dataclass(frozen=True, kw_only=True)
class Held:
    """Of one process."""

    role: str
    rss_bytes: int
    num_descriptors: int
    num_threads: int


def free_port() -> int:
    """That nobody has; the run takes it in a moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class System:
    """`dist-infer launch --detach` of a run file, in a directory of its own. questions: with their answers."""

    def __init__(self, directory: Path, config: Mapping[str, Any], questions: Sequence[Question]) -> None:
        self.shell, self.port = Shell(directory), free_port()
        self.file, self.url = directory / "run.yaml", f"http://127.0.0.1:{self.port}"
        self.file.write_text(yaml.safe_dump({**config, "run": {**config["run"], "port": self.port}}))
        self.questions = list(questions)
        self._environment: dict[str, str] = {}

    def launch(self, environment: Mapping[str, str] | None = None) -> float:
        """Seconds until it was ready. environment: beside this process's; None: that of the last launch."""
        began_s, before = time.monotonic(), dict(os.environ)
        environment = self._environment = self._environment if environment is None else dict(environment)
        os.environ.update(environment)
        try:
            done = self.shell.run("launch", self.file, "--detach", "--no-preflight")
        finally:
            for name in environment:
                os.environ.pop(name)
                if name in before:
                    os.environ[name] = before[name]
        assert done.code == 0, done.err
        return time.monotonic() - began_s

    def revive(self) -> None:
        """Launch it again if an earlier case has ended it: each is judged by itself."""
        if not self.is_ready():
            self.shell.run("down", "tiny", "--now")
            self.launch()

    def ask(self, body: dict[str, Any], timeout_s: float = 60) -> str:
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=timeout_s).raise_for_status()
        return str(answer.json()["choices"][0]["text"])

    def scrape(self) -> Scraped:
        return read_scrape(httpx.get(f"{self.url}/metrics", timeout=20).text, time.monotonic())

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def rank(self, number: int) -> psutil.Process:
        (found,) = self.scrape().labels("dist_infer_rank_info", rank=str(number))
        return psutil.Process(int(found["pid"]))

    def processes(self) -> dict[int, tuple[str, psutil.Process]]:
        """Of the run, by pid, with what each is."""
        return {process.pid: (self._role(process), process) for process in self.shell.processes()}

    def of_role(self, role: str) -> list[psutil.Process]:
        return [process for found, process in self.processes().values() if found == role]

    def _role(self, process: psutil.Process) -> str:
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            return "gone"
        if "launch.entry" in line:
            return "driver"
        return next((role for part, role in _ROLES.items() if part in line), process.name())

    def held(self) -> dict[int, Held]:
        found = {}
        for pid, (role, process) in self.processes().items():
            with contextlib.suppress(psutil.Error), process.oneshot():
                found[pid] = Held(
                    role=role,
                    rss_bytes=process.memory_info().rss,
                    num_descriptors=process.num_fds(),
                    num_threads=process.num_threads(),
                )
        return found
