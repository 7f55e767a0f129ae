"""Every file of configs/ can be planned: a user copies them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dist_infer import load_config
from dist_infer.backend import make_backend
from dist_infer.startup import open_model, plan_run
from partition.hardware import HardwareFacts, NodeFacts, load_hardware
from partition.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RUN_FILES = [file for file in FILES if "model" in yaml.safe_load(file.read_text(encoding="utf-8"))]
SERVE_FILES = [file for file in FILES if "applications" in yaml.safe_load(file.read_text(encoding="utf-8"))]
HARDWARE_FILES = [file for file in FILES if file not in RUN_FILES + SERVE_FILES]  # Serve's: tests/test_deploy.py
LLAMA = f"model.path={ROOT}/tests/data/llama-3.1-405b"
# what a file needs that a machine for tests has not: (hardware, overrides), as the file's own comments say
ELSEWHERE: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "llama-3.1-405b.yaml": [
        ("4-nodes-8x24gib.yaml", (LLAMA,)),
        ("16-cpu-nodes.yaml", (LLAMA, "cluster.device=cpu", "parallel.tensor=2", "parallel.pipeline=16")),
    ]
}
CASES = [
    (file, hardware, overrides) for file in RUN_FILES for hardware, overrides in ELSEWHERE.get(file.name, [("", ())])
]
SMALL_MACHINE = HardwareFacts(
    nodes=(
        NodeFacts(
            name="small",
            cores=2,
            memory_bytes=4 << 30,
            memory_source="test",
            devices=(),
            disk_bytes_per_s=1e9,
            flops=1e11,
            memory_bytes_per_s=1e10,
        ),
    )
)


def plan_of(file: Path, hardware: str = "", overrides: tuple[str, ...] = ()) -> Plan:
    """As `dist-infer plan` makes it, but for a machine of 4 GiB where the file needs no other hardware."""
    config = load_config(file, overrides)
    backend = make_backend(config.cluster, config.name)
    footprint = backend.footprint(config.parallel.tensor, config.parallel.pipeline)
    facts = load_hardware(CONFIGS / "hardware" / hardware) if hardware else SMALL_MACHINE
    return plan_run(config, open_model(config), facts, footprint)


@pytest.mark.parametrize(("file", "hardware", "overrides"), CASES, ids=lambda value: getattr(value, "stem", None))
def test_run_file_can_be_planned(file: Path, hardware: str, overrides: tuple[str, ...]) -> None:
    """Guards the examples against a key, a budget or a planner that changed."""
    plan = plan_of(file, hardware, overrides)
    assert len(plan.ranks) == plan.tensor * plan.pipeline
    assert load_config(file).run is not None


@pytest.mark.parametrize("file", HARDWARE_FILES, ids=lambda file: file.stem)
def test_hardware_file_is_complete(file: Path) -> None:
    """Guards the hardware examples: valid, and every rate written, so that a copy shows all keys."""
    assert all(node.assumed == () for node in load_hardware(file).nodes)


def test_every_hardware_file_is_planned_for() -> None:
    """Guards against a hardware file that no run file's comment speaks of."""
    assert {hardware for cases in ELSEWHERE.values() for hardware, _ in cases} == {file.name for file in HARDWARE_FILES}


def test_the_demo_streams() -> None:
    """Guards the demo's budget: at most a quarter of its layers may stay in memory, on four ranks."""
    plan = plan_of(CONFIGS / "quickstart.yaml")
    layers = [unit for rank in plan.ranks for unit in rank.units if unit.name.startswith("layers.")]
    assert len(plan.ranks) == 4
    assert sum(unit.tier != "nvme" for unit in layers) <= len(layers) // 4


def test_local_streams_where_its_comment_says_so() -> None:
    """Guards the two figures in the comment of configs/local.yaml."""
    local = CONFIGS / "local.yaml"
    assert plan_of(local).ranks[0].streamed_bytes_per_pass == 0
    assert plan_of(local, overrides=("offload.host_memory=192 MiB",)).ranks[0].streamed_bytes_per_pass > 0
