"""What starts fast stays fast: nothing heavy is loaded before it is needed. Asked of fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dist_infer

ROOT = Path(dist_infer.__file__).resolve().parent.parent
HEAVY = ("torch", "ray", "transformers", "gguf", "safetensors", "numpy")


def loaded_after(code: str) -> list[str]:
    """Heavy packages in sys.modules after the code ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import dist_infer",
        "import partition",
        "import launch",
        "import offload",
        "from dist_infer import SamplingParams, load_config, RunConfig, RequestOutput, TokenEvent, errors",
        "import launch.cli, launch.display, launch.interrupt, launch.root_guard",
        "import launch.backend",
        "import dist_infer.startup, dist_infer.backend, dist_infer.location, dist_infer.machine, dist_infer.tokenizer",
        "import dist_infer.engine.loop, dist_infer.engine.fake_executor",
        "import dist_infer.messages, dist_infer.summary, dist_infer.worker.setup, dist_infer.worker.child",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    assert loaded_after(code) == []


def test_the_api_class_loads_no_ray_and_no_torch_by_its_name_alone() -> None:
    assert "ray" not in loaded_after("from dist_infer import LLM")


def test_ray_is_found_only_where_it_is_asked_for() -> None:
    """The entry point is looked up by name; its module must not pull Ray in for a plan."""
    code = (
        "from dist_infer.backend import make_backend\nfrom dist_infer.config import ClusterConfig\n"
        "backend = make_backend(ClusterConfig(executor='ray'), 'x')\n"
        "backend.facts(with_devices=False, sample=None, dtype=None)\nbackend.close()"
    )
    assert loaded_after(code) == []
