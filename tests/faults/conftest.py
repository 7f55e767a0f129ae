"""Processes to be hurt: a serving one that strace can be attached to, forked ones that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEADLINE_S = 60.0
READS = "pread64,preadv,preadv2"


def wait_until(what: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        pause.wait(0.005)


class Strace:
    """strace attached to all threads of a running process; `num_injected` after the end of `injected`."""

    def __init__(self, pid: int, log: Path, calls: str, fault: str) -> None:
        self._pid, self._log = pid, log
        command = ["strace", "-f", "-q", "-o", str(log), "-p", str(pid)]
        self._process = subprocess.Popen(
            [*command, "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}"], stderr=subprocess.PIPE, text=True
        )

    def wait_attached(self) -> None:
        """Every thread that is there is traced; those that come later are from the start."""

        def attached() -> bool:
            assert self._process.poll() is None, self._process.stderr.read()
            return all(_tracer(task) == self._process.pid for task in Path(f"/proc/{self._pid}/task").iterdir())

        wait_until(attached)

    def detach(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=DEADLINE_S)

    @property
    def num_injected(self) -> int:
        """Calls that were tampered with."""
        return self._log.read_text().count("INJECTED") + self._log.read_text().count("DELAYED")


def _tracer(task: Path) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in (task / "status").read_text().splitlines():
            if line.startswith("TracerPid:"):
                return int(line.split()[1])
    return 0


@pytest.fixture
def injected(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Strace]]:
    """with injected(pid, fault, calls=reads): every matching system call of that process meets the fault."""

    @contextlib.contextmanager
    def attach(pid: int, fault: str, calls: str = READS) -> Iterator[Strace]:
        strace = Strace(pid, tmp_path / "strace.log", calls, fault)
        try:
            strace.wait_attached()
            yield strace
        finally:
            strace.detach()

    return attach


class HostProcess:
    """The other end of host.py."""

    def __init__(self, directory: Path) -> None:
        self.short_reads = directory / "short-reads"  # while this file exists, reads come up short
        shim = directory / "short_reads.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", shim, HERE / "short_reads.c", "-ldl"],
            check=True,
        )
        ours, theirs = socket.socketpair()
        environment = {
            "LD_PRELOAD": str(shim),
            "SHORT_READS": str(self.short_reads),
            "DIST_INFER_POISON": "1",  # what a read did not fill is NaN
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "host.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **environment},
        )
        theirs.close()
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, do: str, **order: Any) -> None:
        self._connection.send_bytes(json.dumps({"do": do, **order}).encode())

    def hear(self) -> dict[str, Any]:
        """The next answer; an error if the process died (of SIGBUS, say) instead."""
        assert self._connection.poll(DEADLINE_S), "no answer"
        try:
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except EOFError:
            raise AssertionError(f"the process ended with {self.process.wait(DEADLINE_S)}") from None
        return answer

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Order, and hear the last answer to it."""
        self.start(do, **order)
        while (answer := self.hear()).get("first"):
            pass
        return answer

    def close(self) -> None:
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(DEADLINE_S)
        self.process.kill()
        self.process.wait(5)


@pytest.fixture(scope="session")
def host_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    process = HostProcess(tmp_path_factory.mktemp("host"))
    yield process
    process.close()


def run_config(model: Path, store: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A run on this machine's processor, small enough to be read completely in each pass."""
    config: dict[str, Any] = {
        "model": {"path": str(model)},
        "offload": {"store": str(store), "reader": "threads"},  # strace sees preadv, not io_submit
        "engine": {
            "kv_memory": "1 MiB",
            "block_tokens": 4,
            "max_batch_tokens": 16,
            "max_requests": 4,
            "max_model_len": 240,
        },
        "cluster": {"device": "cpu", "max_restarts": 0},  # what is given out when ranks are lost, not what comes after
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    return config


PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 9]


class Serving:
    """A streamed model that serves in a process of its own once `open`, with a store of its own to damage.

    `golden`: what it answers to PROMPTS undisturbed, 120 tokens long.
    """

    max_tokens = 60

    def __init__(self, process: HostProcess, model: Path, store: Path, golden: list[list[int]]) -> None:
        self.process, self.golden = process, golden
        self._model, self._store = model, store

    def open(self, **sections: Mapping[str, Any]) -> None:
        """Serve; ends what was served before."""
        self.process.ask("close")
        answer = self.process.ask("open", config=run_config(self._model, self._store, **sections), streamed=True)
        assert "error" not in answer, answer
        self.directory, self.streamed = Path(answer["store"]), answer["streamed"]
        assert self.streamed, "the budget of these tests no longer makes it stream"

    def blob(self, unit: str) -> Path:
        return self.directory / f"{unit}.tp0.bin"

    def generate(self, max_tokens: int = max_tokens) -> dict[str, Any]:
        return self.process.ask("generate", prompts=PROMPTS, max_tokens=max_tokens)

    def generate_and(self, hurt: Callable[[], object]) -> dict[str, Any]:
        """Generate all of `golden`; `hurt` is called when the first token is out."""
        self.process.start("generate", prompts=PROMPTS, max_tokens=120)
        assert self.process.hear() == {"first": True}
        hurt()
        return self.process.hear()

    def assert_prefix_of_golden(self, tokens: list[list[int]]) -> None:
        """What was given out before an error is what an undisturbed run gives out."""
        for found, golden in zip(tokens, self.golden, strict=True):
            shared = min(len(found), len(golden))
            assert found[:shared] == golden[:shared]


@pytest.fixture(scope="session")
def packed(
    host_process: HostProcess, tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[list[int]]]:
    """(checkpoint, root of its packed store, undisturbed answers with everything in memory)."""
    model = tiny_checkpoint("llama", num_hidden_layers=12, intermediate_size=1536)  # more than the least plan holds
    store = tmp_path_factory.mktemp("packed")
    opened = host_process.ask("open", config=run_config(model, store), streamed=False)
    assert opened.get("streamed") == [], opened
    answer = host_process.ask("generate", prompts=PROMPTS, max_tokens=120)
    host_process.ask("close")
    return model, store, answer["tokens"]


@pytest.fixture
def serving(host_process: HostProcess, packed: tuple[Path, Path, list[list[int]]], tmp_path: Path) -> Iterator[Serving]:
    model, store, golden = packed
    shutil.copytree(store, tmp_path / "stores")
    yield Serving(host_process, model, tmp_path / "stores", golden)
    host_process.short_reads.unlink(missing_ok=True)
    host_process.ask("close")
