"""benchmarks/gpu_stream.py: the table's arithmetic, and the whole way through without a GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu_runs(monkeypatch):
    """The modules as the script itself imports them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_runs.job
    import gpu_runs.report

    return gpu_runs


def decode(job, **changes):
    values = {"batch": 1, "passes": 10, "seconds": 4.0, "streamed_bytes": 19_000_000_000, "link_bytes_per_s": 50e9}
    return job.Decode(**{**values, "tokens": [[5, 6]], **changes})


def test_rates_are_those_of_the_slower_of_link_and_disk(gpu_runs):
    one = decode(gpu_runs.job)
    assert one.bytes_per_s == 47.5e9
    assert one.limit_bytes_per_s == 50e9
    assert decode(gpu_runs.job, disk_bytes_per_s=3e9).limit_bytes_per_s == 3e9
    assert decode(gpu_runs.job, disk_bytes_per_s=60e9).limit_bytes_per_s == 50e9
    assert decode(gpu_runs.job, link_bytes_per_s=0.0).limit_bytes_per_s == 0.0
    assert decode(gpu_runs.job, batch=32).tokens_per_s == 80


def test_the_first_decode_passes_are_left_out(gpu_runs):
    found = gpu_runs.job.decode_of(4, [9.0, 12.0, 13.0, 14.0, 15.0], streamed_bytes=1, link_bytes_per_s=1.0)
    assert (found.passes, found.seconds) == (3, 3.0)
    with pytest.raises(ValueError, match="2 decode passes"):
        gpu_runs.job.decode_of(4, [9.0, 12.0], streamed_bytes=1, link_bytes_per_s=1.0)


def test_the_table_has_each_competitor_against_the_best_peer_and_says_who_failed(gpu_runs):
    job = gpu_runs.job
    runs = {
        "ours:host": {"decodes": [vars(decode(job)), vars(decode(job, batch=32))], "versions": {"torch": "2"}},
        "accelerate:plain": {"decodes": [vars(decode(job, seconds=20.0, tokens=[[5, 7]]))]},
        "zero:plain": {"error": "Traceback\nImportError: no deepspeed"},
    }
    check = {"equal": {"resident": True, "nvme": False}, "tokens_as_transformers": 0.5}
    facts = {"device": "H200", "driver": "1", "python": "3.12", "model": "a model", "command": "run"}
    lines = gpu_runs.report.markdown({"facts": facts, "runs": runs, "check": check}).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    assert rows == [
        ["dist-infer, host tier", "1", "2.50", "0.400", "19.00 GB", "47.5 GB/s", "50.0 GB/s", "95.0 %", "5.00"],
        ["accelerate, cpu offload", "1", "0.50", "2.000", "19.00 GB", "9.5 GB/s", "50.0 GB/s", "19.0 %", "–"],
        ["dist-infer, host tier", "32", "80.00", "0.400", "19.00 GB", "47.5 GB/s", "50.0 GB/s", "95.0 %", "–"],
    ]
    text = "\n".join(lines)
    assert "DeepSpeed ZeRO-Inference, cpu, pinned did not run: ImportError: no deepspeed." in text
    assert "NOT EQUAL" in text
    assert "accelerate, cpu offload 50 %" in text


def test_the_checkpoint_is_what_its_shape_says_and_no_layer_is_like_another(gpu_runs, tmp_path):
    shape = gpu_runs.job.Shape(layers=2, **gpu_runs.job.TINY)
    gpu_runs.job.write_model(tmp_path, shape)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(shape.parameters())
    assert sum(tensor.nbytes for tensor in tensors.values()) == shape.num_bytes
    assert shape.num_bytes == shape.end_bytes + 2 * shape.layer_bytes
    assert (tensors["model.norm.weight"] == 1).all()
    matrices = [tensor.float() for tensor in tensors.values() if tensor.ndim == 2]
    assert all(matrix.abs().min() > 0.007 and matrix.abs().max() < 0.032 for matrix in matrices)
    assert all(abs(matrix.mean()) < 0.1 / math.sqrt(matrix.shape[0]) for matrix in matrices)


@pytest.mark.slow
def test_the_script_streams_and_compares_tiers_without_a_gpu(tmp_path):
    """All of it but the CUDA calls: planning to a tier, the passes' times, bytes against the plan, table and JSON."""
    command = [sys.executable, str(BENCHMARKS / "gpu_stream.py"), "--device", "cpu", "--layers", "4", "--batch", "1,4"]
    results, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    command += ["--work", str(tmp_path), "--json", str(results), "--markdown", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())
    assert found["check"]["equal"] == {"resident": True, "nvme": True}
    assert found["check"]["streamed_bytes"]["nvme"] > 0
    run = found["runs"]["ours:nvme"]
    assert [one["batch"] for one in run["decodes"]] == [1, 4]
    for one in run["decodes"]:
        assert one["streamed_bytes"] > 0
        assert one["passes"] == 4  # 7 tokens: one from the prompt's pass, the first two decode passes left out
        assert one["disk_bytes_per_s"] > 0
    assert run["notes"]["tiers"]["nvme"] > 0
    assert "dist-infer, nvme tier | 4 |" in table.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
