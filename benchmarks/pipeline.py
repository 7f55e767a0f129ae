"""Two stages with a disk each against one: does a pipeline keep both disks busy?

    python benchmarks/pipeline.py [--rate 200e6] [--new-tokens 24]

Two Ray nodes on this machine, each rank with a reader of its own that delivers `--rate` bytes per second; a random
llama of 270 MB in float32, as good as all of it streamed. A step serves two requests, and as many steps are in flight
as there are stages: so two stages have four requests. Everything waits for the simulated disks, so other load on the
machine hardly matters. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from limited_reader import RATE
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_infer import LLM, SamplingParams, load_config
from dist_infer.backend import Footprint
from dist_infer.errors import BudgetError
from dist_infer.startup import open_model, plan_run
from partition.hardware import HardwareFacts, NodeFacts

PER_STEP = 2
_STEP_BYTES = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200e6)
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model")
        connect(options.rate)
        one = measure(model, Path(directory), stages=1, requests=PER_STEP, options=options)
        same = measure(model, Path(directory), stages=1, requests=2 * PER_STEP, options=options)
        two = measure(model, Path(directory), stages=2, requests=2 * PER_STEP, options=options)
    found = {
        "bytes_per_s_of_each_disk": options.rate,
        "one stage, a step in flight": one,
        "one stage, all four in one step": same,
        "two stages, two steps in flight": two,
        "two_to_one": two["tokens_per_s"] / one["tokens_per_s"],
    }
    print(json.dumps(found, indent=1))


def make_model(path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def connect(rate: float) -> None:
    """Two Ray nodes of this machine, and this process as their driver. Every worker gets the limited reader."""
    import ray
    from ray.cluster_utils import Cluster

    here = Path(__file__).resolve().parent
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    settings = {RATE: str(rate), "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": settings, "worker_process_setup_hook": "limited_reader.install"},
    )


def run_file(model: Path, store: Path, stages: int, requests: int) -> dict[str, Any]:
    return {
        "name": f"pipeline-{stages}-{requests}",
        "model": {"path": str(model), "dtype": "float32"},
        "parallel": {"pipeline": stages},
        "offload": {"store": str(store / "stores"), "reader": "threads", "slots": 2},
        "engine": {"kv_memory": "16 MiB", "max_batch_tokens": 16, "max_requests": requests, "max_model_len": 64},
        "cluster": {"executor": "ray", "address": "auto", "device": "cpu"},
    }


def least_memory(config: dict[str, Any]) -> int:
    """Host memory of a node with which there is just a plan: as good as everything is streamed."""
    loaded = load_config(config)
    model, pipeline = open_model(loaded), loaded.parallel.pipeline
    nodes = [
        NodeFacts(
            name=f"n{index}",
            cores=2,
            memory_bytes=8 << 30,
            memory_source="",
            devices=(),
            disk_bytes_per_s=1e9,
            flops=1e11,
            memory_bytes_per_s=1e10,
        )
        for index in range(pipeline)
    ]

    def fits(memory: int) -> bool:
        trial = load_config({**config, "offload": {**config["offload"], "host_memory": memory}})
        try:
            plan_run(trial, model, HardwareFacts(nodes=tuple(nodes)), Footprint(rank_bytes=0, launcher_bytes=0))
        except BudgetError:
            return False
        return True

    too_few, enough = 0, 1 << 30
    while enough - too_few > _STEP_BYTES:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    return enough


def measure(model: Path, store: Path, *, stages: int, requests: int, options: argparse.Namespace) -> dict[str, Any]:
    config = run_file(model, store, stages, requests)
    config["offload"]["host_memory"] = least_memory(config)
    params = SamplingParams(max_tokens=options.new_tokens, temperature=0, ignore_eos=True)
    with LLM(config) as llm:
        prompts = [[index + 3, index + 4, index + 5] for index in range(requests)]
        llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))  # the cold pass
        before, started = llm.stream_reports(), time.monotonic()
        outputs = llm.generate(prompts, params)
        seconds = time.monotonic() - started
        after = llm.stream_reports()
        plan = llm.plan
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    read = [end.bytes_read - start.bytes_read for start, end in zip(before, after, strict=True)]
    return {
        "requests": requests,
        "steps_in_flight": plan.max_steps_in_flight,
        "nodes": sorted({rank.node for rank in plan.ranks}),
        "streamed_bytes_per_pass": [rank.streamed_bytes_per_pass for rank in plan.ranks],
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "disk_busy": [count / (options.rate * seconds) for count in read],
    }


if __name__ == "__main__":
    sys.exit(main())
