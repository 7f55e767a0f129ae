"""GPU facts through nvidia-ml-py, from a driver library of ours in front of the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import dist_infer
from dist_infer.messages import decode
from launch.doctor.devices import DeviceFacts, judge_devices

ROOT = Path(dist_infer.__file__).resolve().parent.parent
READ = (
    "import sys\nfrom launch.doctor.devices import read_devices\nfrom dist_infer.messages import encode\n"
    "sys.stdout.buffer.write(encode(read_devices()))"
)
Read = Callable[..., DeviceFacts]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """read("te", CUDA_VISIBLE_DEVICES="1"): in a process with a torch for CUDA 12.4 and the fake driver."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_nvml.c")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True, timeout=60)
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('takes seconds')")
    (folder / "torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '12.4'\n")

    def ask(faults: str = "", **environment: str) -> DeviceFacts:
        own = {"PYTHONPATH": f"{folder}:{ROOT}", "LD_LIBRARY_PATH": str(folder), "FAKE_NVML": faults}
        inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", READ],
            capture_output=True,
            env={**inherited, **own, **environment},
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return decode(DeviceFacts, done.stdout)

    return ask


def test_two_gpus_without_faults(read: Read) -> None:
    """A GPU without ECC and a power cap under load are no problems; torch is not imported."""
    facts = read()
    assert (facts.driver, facts.cuda, facts.torch_cuda) == ("550.54.15", (12, 4), "12.4")
    assert [device.ecc_errors for device in facts.devices] == [None, 0]
    (finding,) = judge_devices({"a": facts}, here="a")
    assert finding.severity == "ok"
    assert "1: Fake 24G, 23.50 GiB of 24.00 GiB free" in finding.what
    assert [device.index for device in read(CUDA_VISIBLE_DEVICES="1").devices] == [1]


@pytest.mark.parametrize(
    ("faults", "severity", "words"),
    [
        ("t", "warning", "6.00 GiB of 24.00 GiB are taken"),
        ("e", "warning", "3 uncorrected memory errors"),
        ("p", "warning", "rows will be replaced at the next reset"),
        ("f", "error", "row remapping failed"),
        ("h", "warning", "slowed down: too hot (hardware)"),
    ],
)
def test_what_ails_a_gpu(read: Read, faults: str, severity: str, words: str) -> None:
    (finding,) = judge_devices({"a": read(faults)}, here="a")
    assert finding.severity == severity
    assert finding.what.startswith("GPU 1 (Fake 24G)")
    assert words in finding.what


def test_a_torch_that_this_driver_cannot_run(read: Read) -> None:
    """Known without loading it, which takes seconds and a crash."""
    facts = read()
    (older,) = judge_devices({"a": replace(facts, torch_cuda="13.0")}, here="a")
    assert (older.severity, older.exit_code) == ("error", 4)
    (cpu,) = judge_devices({"a": replace(facts, torch_cuda="")}, here="a")
    assert "built without CUDA" in cpu.what


def test_nodes_with_two_drivers_or_without_gpus(read: Read) -> None:
    facts = read()
    found = judge_devices({"a": facts, "b": replace(facts, driver="535.1")}, here="a")
    assert [(each.severity, each.where) for each in found] == [("ok", "a"), ("ok", "b"), ("warning", "b")]
    none = replace(facts, driver="", devices=(), problem="Driver Not Loaded")
    (missing,) = judge_devices({"a": none}, here="a")
    assert (missing.severity, missing.exit_code, missing.what) == ("error", 2, "Driver Not Loaded")
    hidden = read(CUDA_VISIBLE_DEVICES="")
    assert judge_devices({"a": hidden}, here="a")[0].what == "the driver shows this process no GPU"
