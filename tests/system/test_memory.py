"""Memory promises on the demo model: packing is bounded, and `auto` stays within a memory cgroup."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from demo_model import SMOLLM2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
GIB = 1 << 30
LARGEST_UNIT = 49152 * 576 * 4  # the embedding in float32

PACK = """
import sys, threading, time
import gguf.quants, torch
import dist_infer.model.source
from dist_infer.config import load_config
from dist_infer.startup import open_model, pack_model

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

config = load_config(sys.argv[1])
model = open_model(config)
base = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
pack_model(config, model, lambda progress: None)
done.set()
watcher.join()
print(peak - base)
"""


def write_run(directory: Path, **sections: object) -> Path:
    file = directory / "run.yaml"
    config = {
        "model": {"path": SMOLLM2, "dtype": "float32"},
        "offload": {"store": str(directory / "stores")},
        "engine": {"max_requests": 4, "max_model_len": 256},
        "cluster": {"executor": "local", "device": "cpu"},
        "run": {"kind": "generate", "max_tokens": 8, "prompts": ["What is the capital of France?", "Hello!"]},
    }
    file.write_text(yaml.safe_dump({**config, **sections}))
    return file


def test_packing_takes_at_most_three_largest_units(tmp_path: Path) -> None:
    """Guards against converting or sharding the whole model, or several units, at a time."""
    run = write_run(tmp_path, parallel={"tensor": 2})
    output = subprocess.run([sys.executable, "-c", PACK, str(run)], capture_output=True, text=True, timeout=200)
    assert output.returncode == 0, output.stderr
    assert int(output.stdout) <= 3 * LARGEST_UNIT


class MemoryGroup:
    """A memory cgroup of this test, v1 or v2, whichever the machine has."""

    def __init__(self, limit: int) -> None:
        name = f"dist-infer-test-{uuid.uuid4().hex[:8]}"
        v1 = Path("/sys/fs/cgroup/memory")
        self.is_v1 = (v1 / "memory.limit_in_bytes").exists() or (v1 / "cgroup.procs").exists()
        self.folder = (v1 if self.is_v1 else Path("/sys/fs/cgroup")) / name
        self.folder.mkdir()
        self._write("memory.limit_in_bytes" if self.is_v1 else "memory.max", limit)
        if not self.is_v1:
            self._write("memory.swap.max", 0)

    def _write(self, file: str, value: int) -> None:
        (self.folder / file).write_text(str(value))  # one write: two would set the limit to what the second says

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        procs = self.folder / "cgroup.procs"
        inside = f'echo $$ > {procs} && exec "$@"'
        return subprocess.run(["sh", "-c", inside, "sh", *command], capture_output=True, text=True, timeout=250)

    @property
    def peak(self) -> int:
        return int((self.folder / ("memory.max_usage_in_bytes" if self.is_v1 else "memory.peak")).read_text())


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    made = MemoryGroup(GIB)
    yield made
    os.rmdir(made.folder)


def test_auto_stays_within_a_memory_cgroup(tmp_path: Path, group: MemoryGroup) -> None:
    """host_memory: auto in a cgroup smaller than process and weights together: streams, is not killed, answers."""
    run = write_run(tmp_path)
    finished = group.run([sys.executable, "-m", "launch.cli", "launch", str(run), "--json"])
    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout)
    budget = document["plan"]["budgets"][0]
    assert "cgroup" in budget["source"]
    assert budget["used_bytes"] <= budget["limit_bytes"] < GIB
    assert any(unit["tier"] == "nvme" for unit in document["plan"]["ranks"][0]["units"])
    assert "Paris" in document["outputs"][0]["outputs"][0]["text"]
    assert group.peak <= GIB
