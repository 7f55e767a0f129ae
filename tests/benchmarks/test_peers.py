"""`benchmarks/peers.py` without its peers: the checkpoint's forms are one model, the report says what was run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "peers.py"
GIB = 1 << 30


def peers(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def mark(seconds: float, num_tokens: int, read_bytes: int = 0) -> dict[str, Any]:
    return {"seconds": seconds, "cpu_s": 1.0, "read_bytes": read_bytes, "num_tokens": num_tokens}


def record(name: str, weights: str, rate: float, **changes: Any) -> dict[str, Any]:
    """Batch 1: ready after 4 s, first token a second later, then two more at `rate`."""
    steps = [mark(5.0, 1), mark(5.0 + 1 / rate, 2, 10**9), mark(5.0 + 2 / rate, 3, 2 * 10**9)]
    return {
        "competitor": name,
        "weights": weights,
        "batch": 1,
        "round": 1,
        "ended": "ok",
        "limit_bytes": 3 * GIB,
        "peak_bytes": 2 * GIB,
        "wall_s": 9.0,
        "cpu_s": 3.0,
        "device_bytes": 0,
        "cold": True,
        "raw_before": 1e9,
        "raw_after": 2e9,
        "error": "",
        "write_rate": None,
        "result": {
            "loaded": mark(4.0, 0),
            "steps": steps,
            "token_ids": [[7, 8, 9]],
            "max_rss_bytes": GIB,
            "versions": {"torch": "2.13.0"},
            "settings": {},
        },
        **changes,
    }


def report(tmp_path: Path, runs: list[dict[str, Any]], packs: list[dict[str, Any]]) -> str:
    document = {
        "machine": {
            "processor": "a processor",
            "cores": 2,
            "vector_units": [],
            "memory_bytes": 24 * GIB,
            "kernel": "6.1",
            "disk": "vda",
        },
        "command": "python benchmarks/peers.py run",
        "revision": "abc",
        "started": "today",
        "model": {
            "layers": 32,
            "hidden": 2560,
            "intermediate": 7168,
            "heads": 20,
            "kv_heads": 4,
            "vocab": 32000,
            "num_bytes": 4 * 10**9,
        },
        "memory_bytes": 3 * GIB,
        "threads": 2,
        "kernels": "C kernels (library)",
        "work": {"1": {"batch": 1, "prompt_tokens": 16, "new_tokens": 3}},
        "packs": packs,
        "runs": runs,
    }
    file = tmp_path / "results.json"
    file.write_text(json.dumps(document))
    return peers("report", str(file))


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report_takes_medians_and_the_best_peer(tmp_path: Path) -> None:
    """Guards the ratios: a single lucky round, a slower peer, or a peer outside the group must not decide them."""
    runs = [
        *(record("accelerate, disk", "bf16", rate) for rate in (0.2, 0.3, 0.9)),
        record("llama.cpp mmap, BF16", "bf16", 0.25),
        record("DeepSpeed", "bf16", 5.0, limit_bytes=None),
        record("llama.cpp in RAM, Q4_0", "q4_0", 8.0, limit_bytes=None),
        *(record("dist-infer, float", "bf16", rate) for rate in (0.5, 0.75, 0.8)),
        record("dist-infer, int4", "int4", 9.0),
    ]
    text = report(tmp_path, runs, [])
    assert row(text, "accelerate, disk")[2] == "0.30 (0.20–0.90)"
    assert row(text, "DeepSpeed (no limit)")[2].startswith("5.00")
    assert row(text, "batch 1, bf16")[1:] == ["2.50 × (0.75 against 0.30 tok/s, accelerate, disk)", "yes"]
    assert row(text, "batch 1, int4")[1:] == ["1.12 × (9.00 against 8.00 tok/s, llama.cpp in RAM, Q4_0)", "**no**"]
    assert row(text, "batch 32, int4")[1:] == ["not measured", "–"]
    assert row(text, "dist-infer, float: process start")[1:] == ["5.0 s of 11.3 s", "yes"]


def test_report_shows_what_was_killed(tmp_path: Path) -> None:
    """Guards against a competitor that vanishes from the table, or a kill of ours that is passed over."""
    killed = {"ended": "killed", "result": {}, "error": "no memory", "peak_bytes": 3 * GIB}
    runs = [record("DeepSpeed", "bf16", 1.0, **killed), record("dist-infer, float", "bf16", 1.0, **killed)]
    text = report(tmp_path, runs, [])
    assert row(text, "DeepSpeed")[2] == "killed"
    assert row(text, "the process tree")[1:] == ["3.00 of 3.00 GiB at most, 1 of 1 runs killed", "**no**"]


def test_packing_is_measured_by_what_moves_more(tmp_path: Path) -> None:
    """Guards the packing rate: int4 reads four times what it writes, and it is the reading that bounds it."""
    made = {"pack": {"seconds": 4.0, "bytes_written": 10**9, "num_written": 34}}
    pack = record("dist-infer, int4", "int4", 1.0, result=made, write_rate=1.5e9)
    text = report(tmp_path, [record("dist-infer, int4", "int4", 1.0)], [pack])
    assert row(text, "dist-infer, int4: packs")[1:] == ["1.00 GB/s = 67 % (read 2.00, write 1.50 GB/s; 4.0 s)", "yes"]


@pytest.mark.slow
def test_gguf_forms_are_the_same_model(tmp_path: Path) -> None:
    """Guards the comparison itself: rotary rows in llama.cpp's order, nothing lost, nothing quantized by mistake."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    peers("model", "--shape", "tiny", "--work", str(tmp_path))
    folder = tmp_path / "models" / "llama-tiny"
    (file,) = (folder / "safetensors").glob("*.safetensors")
    weights = load_file(file)
    query = weights["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    down = weights["model.layers.3.mlp.down_proj.weight"].float().numpy()
    for kind, least in (("bf16", 1.0), ("q8_0", 0.9999), ("q4_0", 0.99)):
        tensors = {tensor.name: tensor for tensor in GGUFReader(folder / f"{kind}.gguf").tensors}
        assert len(tensors) == len(weights)
        found = dequantize(tensors["blk.0.attn_q.weight"].data, tensors["blk.0.attn_q.weight"].tensor_type)
        # a head of 64: row 2i is its row i, row 2i + 1 its row 32 + i
        for row_here, row_there in ((0, 0), (1, 32), (2, 1), (63, 63), (65, 96)):
            assert cosine(found[row_here], query[row_there]) >= least - 1e-6
        found = dequantize(tensors["blk.3.ffn_down.weight"].data, tensors["blk.3.ffn_down.weight"].tensor_type)
        assert cosine(found.ravel(), down.ravel()) >= least - 1e-6
    assert weights["model.norm.weight"].dtype == torch.bfloat16


def cosine(one: Any, other: Any) -> float:
    return float(np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other))
