"""FAULTS T10: too little memory is refused before anything starts; memory that runs out later is called by its name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dist_infer.worker.oom_watch import OomWatch
from offload.machine import oom_kills

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20
GIB = 1 << 30

# Takes memory in pieces until somebody in the group was killed for it, so that it is not taken from anybody else.
HOG = """
import sys
from pathlib import Path

counters, pieces = Path(sys.argv[1]), []
while "oom_kill 0" in counters.read_text():
    pieces.append(bytearray(b"x") * (2 << 20))
"""


class MemoryGroup:
    """A memory cgroup of this test, v1 or v2, whichever the machine has."""

    def __init__(self, limit: int) -> None:
        v1 = Path("/sys/fs/cgroup/memory")
        self._is_v1 = (v1 / "cgroup.procs").exists()
        self.folder = (v1 if self._is_v1 else Path("/sys/fs/cgroup")) / f"dist-infer-test-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        if not self._is_v1:
            (self.folder / "memory.swap.max").write_text("0")
        self.limit(limit)

    @property
    def counters(self) -> Path:
        """The file with a line "oom_kill COUNT"."""
        return self.folder / ("memory.oom_control" if self._is_v1 else "memory.events")

    def limit(self, num_bytes: int) -> None:
        (self.folder / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")).write_text(str(num_bytes))

    def used(self) -> int:
        return int((self.folder / ("memory.usage_in_bytes" if self._is_v1 else "memory.current")).read_text())

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        """Run a command in the group, errors and output together."""
        inside = f'echo $$ > {self.folder / "cgroup.procs"} && exec "$@"'
        return subprocess.Popen(
            ["sh", "-c", inside, "sh", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    """Whatever still runs in it is killed at the end."""
    made = MemoryGroup(8 * GIB)
    yield made
    for pid in (made.folder / "cgroup.procs").read_text().split():
        subprocess.run(["kill", "-9", pid], check=False)
    while (made.folder / "cgroup.procs").read_text():
        os.sched_yield()
    made.folder.rmdir()


@pytest.fixture
def write_run(tiny_checkpoint: Callable[..., Path], store_root: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(**sections: Any) -> Path:
        config = {
            "model": {"path": str(tiny_checkpoint("llama", max_position_embeddings=16384, eos_token_id=None))},
            "offload": {"store": str(store_root)},
            "engine": {"max_model_len": 16000, "kv_memory": "64 MiB", "max_requests": 4},
            "cluster": {"device": "cpu"},
            **sections,
        }
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    return write


SERVE = """
import sys
from dist_infer import LLM, SamplingParams, load_config
from dist_infer.errors import DistInferError
from dist_infer.outputs import Failed

try:
    with LLM(load_config(sys.argv[1])) as llm:
        params = SamplingParams(max_tokens=15000, temperature=0, ignore_eos=True)
        for number, (_, event) in enumerate(llm.events([(None, [5, 6])], [params])):
            if number == 0:
                print("serving")
            if isinstance(event, Failed):
                raise event.error
except DistInferError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (150 * MIB, r"has 1[\d.]+ MiB \(cgroup v\d /\S*dist-infer-test-.* need "),
        (500 * MIB, r"engine\.kv_memory 64\.00 MiB|needs at least"),
    ],
    ids=["processes", "kv"],
)
def test_a_group_smaller_than_the_plan_is_refused_with_both_figures(
    limit: int, words: str, group: MemoryGroup, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Too little for the process, or for the KV cache beside it: exit 2, nothing packed, nothing killed."""
    group.limit(limit)
    run = write_run(offload={"store": str(tmp_path / "none")}, run={"kind": "generate", "prompts": ["x"]})
    process = group.start(sys.executable, "-m", "launch.cli", "launch", run)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert said.startswith("error: "), said
    assert re.search(words, said), said
    assert len(re.findall(r"[\d.]+ .iB", said)) >= 2, said
    assert re.search(r"offload\.host_memory|engine\.|more memory", said), said
    assert not (tmp_path / "none").exists()
    assert "oom_kill 0" in group.counters.read_text()


def is_rank(process: psutil.Process) -> bool:
    command = " ".join(process.cmdline())
    return "dist_infer.worker.child" in command or "RankActor" in command


def oom_score_adjustment(pid: int) -> int:
    """Of several processes the kernel ends the one where this is larger, sizes being equal."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_rank_killed_for_memory_is_said_to_be(
    executor: str, group: MemoryGroup, write_run: Callable[..., Path]
) -> None:
    """Two ranks serve, and another program takes the rest of the memory: a rank is killed, and not the parent."""
    run = write_run(parallel={"tensor": 2}, cluster={"device": "cpu", "executor": executor, "max_restarts": 0})
    process = group.start(sys.executable, "-c", SERVE, run)
    lines = iter(process.stdout.readline, "")
    before = next((line for line in lines if line == "serving\n"), None)
    assert before == "serving\n"
    ranks = [rank for rank in psutil.Process(process.pid).children(recursive=True) if is_rank(rank)]
    assert len(ranks) == 2
    assert all(oom_score_adjustment(rank.pid) > oom_score_adjustment(process.pid) for rank in ranks)
    group.limit(group.used() + 32 * MIB)
    hog = group.start(sys.executable, "-c", HOG, group.counters)
    said, _ = process.communicate(timeout=60)
    hog.communicate(timeout=60)
    assert process.returncode == 4, said
    said = next(line for line in said.splitlines() if line.startswith("ClusterError "))  # Ray's own words come first
    assert re.search(rf"is out of memory: .* OOM killer has struck in cgroup v\d /\S*{group.folder.name}", said), said
    assert "offload.host_memory" in said


def test_counts_before_the_start_are_no_news() -> None:
    """A machine or container on which something was killed last week has memory today."""
    counts = {"cgroup v2 /a": 3, "cgroup v2 /": 7, "this machine": 20}
    watch = OomWatch(lambda: counts)
    assert watch.explain() == ""
    counts["this machine"] = 21
    assert "probably out of memory: the kernel's OOM killer has struck in this machine" in watch.explain()
    counts["cgroup v2 /"] = 8
    assert "It is out of memory: the kernel's OOM killer has struck in cgroup v2 / since" in watch.explain()


def test_the_real_counters_are_read() -> None:
    """Both versions of cgroups and the machine's own; a name that the kernel changed would leave the dict empty."""
    counts = oom_kills()
    assert "this machine" in counts
    assert any(where.startswith("cgroup v") for where in counts)
    assert all(count >= 0 for count in counts.values())
