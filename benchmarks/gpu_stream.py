"""Streaming from host memory to a GPU during decode, against the pinned copy rate and against other offloaders.

Run: python benchmarks/gpu_stream.py --time-limit 570 --json gpu.json --markdown gpu.md

On a machine with an NVIDIA GPU. One synthetic Llama (`--layers` layers of 1.71 GB; checkpoint and packed store take
that much disk each) is run by each competitor in turn, each in a process of its own:

    check              answers from every tier, of a small random model: equal to the bit?
    ours:host          dist-infer, layers in pinned host memory
    accelerate:plain   transformers with accelerate's CPU offload; accelerate:pinned gets its weights pinned by hand
    zero:plain         DeepSpeed ZeRO-Inference: stage 3, offload_param cpu, pin_memory
    ours:nvme          dist-infer, layers on disk: disk -> pinned slots -> device

What is missing (a package, memory, time) costs that competitor its rows and no other. With `--device cpu` a tiny model
goes the same way without a GPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_runs.job import FULL, TINY, Job, Shape, write_model
from gpu_runs.report import markdown

RUNS = Path(__file__).resolve().parent / "gpu_runs"
SCRIPTS = {
    "check": "check.py",
    "ours": "ours.py",
    "accelerate": "accelerate_offload.py",
    "zero": "zero_inference.py",
}
ON_CUDA = ("check", "ours:host", "accelerate:plain", "zero:plain", "accelerate:pinned", "ours:nvme")
ON_CPU = ("check", "ours:nvme")
CHECKED = Shape(hidden=1024, intermediate=2816, layers=6, heads=16, kv_heads=4, head_dim=64, vocab=4096)
_LEAST_SECONDS = 15.0  # a competitor with less is not started
_ERROR_CHARS = 4000
_DISK_TOKENS = 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=570.0, help="seconds for everything together")
    parser.add_argument("--run-limit", type=float, default=240.0, help="seconds for one competitor")
    parser.add_argument("--device", choices=("cuda:0", "cpu"), default="cuda:0")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--resident-layers", type=int, default=0, help="layers that stay on the device")
    parser.add_argument("--batch", type=_numbers, default=(1, 32), help="e.g. 1,32")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), help="e.g. ours:host,zero:plain")
    parser.add_argument("--work", type=Path, help="an empty folder on a local disk (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="all figures; written anew after each competitor")
    parser.add_argument("--markdown", type=Path, help="the table; it goes to stdout as well")
    arguments = parser.parse_args()
    known = ON_CPU if arguments.device == "cpu" else ON_CUDA
    wanted = arguments.only or known
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"{', '.join(unknown)}: on {arguments.device} there are {', '.join(known)}")
    deadline = time.monotonic() + arguments.time_limit
    work = Path(tempfile.mkdtemp(prefix="gpu-stream-", dir=arguments.work))
    try:
        results = run_all(arguments, wanted, work, deadline)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    table = markdown(results)
    print(table)
    if arguments.markdown:
        arguments.markdown.write_text(table)
    return 0 if any("decodes" in run for run in results["runs"].values()) or "equal" in results["check"] else 1


def run_all(arguments: argparse.Namespace, wanted: Sequence[str], work: Path, deadline: float) -> dict[str, Any]:
    """Each competitor in turn until the deadline."""
    shape = Shape(layers=arguments.layers, **(TINY if arguments.device == "cpu" else FULL))
    job = Job(
        model=str(write_model(work / "model", shape)),
        work=str(work / "large"),
        device=arguments.device,
        setting="",
        batches=arguments.batch,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        shape=shape,
        resident_layers=arguments.resident_layers,
    )
    small = replace(
        job,
        model=str(work / "random"),
        work=str(work / "small"),
        shape=Shape(layers=4, **TINY) if arguments.device == "cpu" else CHECKED,
        batches=(8,),
        new_tokens=32,
        resident_layers=0,
    )
    model = f"{shape.layers} layers of {shape.layer_bytes / 1e9:.2f} GB, {shape.num_bytes / 1e9:.1f} GB in bfloat16"
    results: dict[str, Any] = {
        "facts": {**_device_facts(), "model": model, "python": platform.python_version(), "command": _command()},
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "check": {},
        "runs": {},
    }
    for name in wanted:
        left = min(deadline - time.monotonic(), arguments.run_limit)
        say(f"{name}: {left:.0f} s at most")
        kind, _, setting = name.partition(":")
        todo = small if kind == "check" else replace(job, setting=setting)
        if setting == "nvme":  # a pass takes as long as the disk does
            todo = replace(todo, new_tokens=min(todo.new_tokens, _DISK_TOKENS))
        found = run_one(RUNS / SCRIPTS[kind], todo, work, left)
        if kind == "check":
            results["check"] = found
        else:
            results["runs"][name] = found
        say(f"{name}: {'failed: ' + found['error'][-_ERROR_CHARS:] if 'error' in found else 'ok'}")
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    return results


def run_one(script: Path, job: Job, work: Path, limit_s: float) -> dict[str, Any]:
    """The script's result, or {"error": ...}. It and all it started are gone when this returns."""
    if limit_s < _LEAST_SECONDS:
        return {"error": f"not started: {max(0.0, limit_s):.0f} s were left"}
    file = work / "job.json"
    file.write_text(json.dumps(asdict(job)))
    paths = [str(RUNS.parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(script), str(file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=variables,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        output, errors = process.communicate()
        return {"error": f"{errors[-_ERROR_CHARS:]}\nnot done after {limit_s:.0f} s"}
    except BaseException:
        _end(process)
        process.wait()
        raise
    result = last_json(output)
    if process.returncode or result is None:
        return {
            "error": f"{errors[-_ERROR_CHARS:].rstrip() or output[-_ERROR_CHARS:]}\nended with {process.returncode}"
        }
    return {**result, "wall_s": time.monotonic() - started}


def last_json(output: str) -> dict[str, Any] | None:
    """Libraries print on stdout as well: the result is the last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else None
    return None


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    """The process leads a group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _device_facts() -> Mapping[str, str]:
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current",
        "--format=csv,noheader",
    ]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {"device": f"{platform.machine()} CPU, no GPU", "driver": "none"}
    name, driver, generation, width = (part.strip() for part in line.split(","))
    return {"device": f"{name}, PCIe gen {generation} x{width}", "driver": driver}


def _command() -> str:
    return " ".join(["python benchmarks/gpu_stream.py", *sys.argv[1:]])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
