"""A run file for a tiny model, and the doctor in a process of its own, where faults can be planted around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import dist_infer

ROOT = Path(dist_infer.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Diagnosis:
    """What `dist-infer doctor --json` said, and how it ended."""

    code: int
    findings: list[dict[str, str]]

    def of(self, check: str, severity: str | None = None) -> list[dict[str, str]]:
        return [each for each in self.findings if each["check"] == check and severity in (None, each["severity"])]

    @property
    def problems(self) -> list[dict[str, str]]:
        return [each for each in self.findings if each["severity"] != "ok"]


Doctor = Callable[..., Diagnosis]


@pytest.fixture
def content(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """A run file's content; nothing is wrong with it."""
    return {
        "model": {"path": str(tiny_checkpoint("llama"))},
        "offload": {"store": str(tmp_path / "stores")},
        "cluster": {"device": "cpu"},
        "engine": {"max_model_len": 64, "kv_memory": "1 MiB", "max_requests": 4},
    }


@pytest.fixture
def doctor(content: Mapping[str, Any], tmp_path: Path) -> Doctor:
    """doctor(around=["unshare", "-m"], environment={…}, **sections): in a child, inside of what is around it."""

    def run(around: Sequence[str] = (), environment: Mapping[str, str] | None = None, **sections: Any) -> Diagnosis:
        merged = {**content}
        for name, values in sections.items():
            merged[name] = {**merged.get(name, {}), **values}
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(merged))
        done = subprocess.run(
            [*around, sys.executable, "-P", "-m", "launch.cli", "doctor", str(file), "--json"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            timeout=60,
            check=False,
        )
        assert done.stdout, done.stderr
        report = json.loads(done.stdout)
        assert report["exit_code"] == done.returncode
        return Diagnosis(done.returncode, report["findings"])

    return run
