"""host_memory: auto uses a memory cgroup to the last slot, and never more: a model of 4.7 GB in 1.5, 3 and 6 GiB."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from large_model import write_large_llama

from benchmarks.memory_group import MemoryGroup
from dist_infer.backend import PROCESS_FOOTPRINT_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
GIB = 1 << 30

RUN = """
import json, sys
from dist_infer import LLM, SamplingParams
from partition.plan import plan_to_json

with LLM(sys.argv[1]) as llm:
    outputs = llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    print(json.dumps({"plan": json.loads(plan_to_json(llm.plan)), "tokens": [o.outputs[0].token_ids for o in outputs]}))
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of the large model, packed. Its files go at once: they are gigabytes."""
    directory = tmp_path_factory.mktemp("large")
    checkpoint = write_large_llama(directory / "model")
    file = directory / "run.yaml"
    config = {
        "model": {"path": str(checkpoint)},
        "offload": {"store": str(directory / "stores")},
        "engine": {"max_requests": 2, "max_model_len": 64, "max_batch_tokens": 64},
        "cluster": {"executor": "local", "device": "cpu"},
    }
    file.write_text(yaml.safe_dump(config))
    with MemoryGroup(3 * GIB // 2) as group:
        packed = _in(group, [sys.executable, "-m", "launch.cli", "pack", str(file)])
        assert packed.returncode == 0, packed.stderr
    yield file
    for path in directory.rglob("*"):
        if path.is_file():
            path.unlink()


def _in(group: MemoryGroup, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(group.command(command), capture_output=True, text=True, timeout=200)


def _resident_places(units: list[dict[str, Any]]) -> list[int]:
    """Bytes in memory of each layer, in order."""
    layers = [unit for unit in units if unit["name"].startswith("layers.")]
    return [unit["num_bytes"] if unit["tier"] == "host" else unit["kept_bytes"] for unit in layers]


@pytest.mark.parametrize("limit", [3 * GIB // 2, 3 * GIB, 6 * GIB], ids=["1.5GiB", "3GiB", "6GiB"])
def test_auto_uses_what_there_is_and_no_more(run_file: Path, limit: int) -> None:
    """Guards the budget from both sides: a reserve that wastes memory, and a plan that takes too much."""
    with MemoryGroup(limit) as group:
        finished = _in(group, [sys.executable, "-c", RUN, str(run_file)])
        peak, kills = group.peak_bytes, group.num_kills
    assert finished.returncode == 0, finished.stderr
    assert kills == 0
    assert peak is not None
    assert peak <= limit
    document = json.loads(finished.stdout)
    rank = document["plan"]["ranks"][0]
    assert [len(tokens) for tokens in document["tokens"]] == [4, 4]
    slots = rank["num_slots"] * rank["slot_bytes"]
    places = _resident_places(rank["units"])
    ends = sum(u["num_bytes"] for u in rank["units"] if u["tier"] == "host" and not u["name"].startswith("layers."))
    resident = sum(places) + ends
    everything = sum(unit["num_bytes"] for unit in rank["units"] if unit["tier"] != "rows")
    room = limit - rank["kv_bytes"] - slots - PROCESS_FOOTPRINT_BYTES
    assert resident == everything or resident >= 0.85 * room, (resident, room, slots, rank["kv_bytes"])
    # evenly: every quarter of the cycle holds its share, give or take a layer
    size = max(unit["num_bytes"] for unit in rank["units"] if unit["name"].startswith("layers."))
    quarters = [sum(places[first : first + 8]) for first in range(0, len(places), 8)]
    assert max(quarters) - min(quarters) <= size
