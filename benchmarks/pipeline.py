"""Two nodes against one, each with a disk of its own: does a pipeline keep both disks busy?

    python benchmarks/pipeline.py [--rate 200e6] [--new-tokens 12] [--rounds 3]

Ray nodes on this machine, each rank with a reader of its own that delivers `--rate` bytes per second; a random llama
of 270 MB in float32, as good as all of it streamed. Four requests. Every node has the same memory for KV rows, room for
two requests over all layers: so one stage serves them two at a time, and two stages, with half of the layers each, all
four, two in each of two steps in flight. Beside that one stage with room for four.

The arrangements take turns; medians are printed as JSON. All must give the same tokens. Everything waits for the
simulated disks, so other load on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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

REQUESTS = 4
BLOCK_TOKENS = 32  # a request's prompt and answer
PROMPT_TOKENS = 8
LAYERS, HIDDEN = 16, 512
_KV_BYTES = BLOCK_TOKENS * LAYERS * HIDDEN * 2 * 4  # of a request, over all layers
_STEP_BYTES = 1 << 20
ARRANGEMENTS = {  # stages, requests that one node has memory for over all layers
    "one stage": (1, REQUESTS // 2),
    "one stage, memory for all four": (1, REQUESTS),
    "two stages": (2, REQUESTS // 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200e6)
    parser.add_argument("--new-tokens", type=int, default=12, help=f"at most {BLOCK_TOKENS - PROMPT_TOKENS}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARRANGEMENTS}
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model")
        connect(options.rate)
        for _ in range(options.rounds):
            for name, (stages, room) in ARRANGEMENTS.items():
                config = run_file(model, Path(directory), stages, room)
                config["offload"]["host_memory"] = least_memory(config)
                found[name].append(measure(config, options))
    tokens = {json.dumps(run.pop("tokens")) for runs in found.values() for run in runs}
    if len(tokens) != 1:
        raise SystemExit("the arrangements gave different tokens")
    medians = {name: statistics.median(run["tokens_per_s"] for run in runs) for name, runs in found.items()}
    answer = {
        "bytes_per_s_of_each_disk": options.rate,
        "median_tokens_per_s": medians,
        "two_to_one": medians["two stages"] / medians["one stage"],
        "runs": found,
    }
    print(json.dumps(answer, indent=1))


def make_model(path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
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


def run_file(model: Path, store: Path, stages: int, room: int) -> dict[str, Any]:
    return {
        "name": f"pipeline-{stages}-{room}",
        "model": {"path": str(model), "dtype": "float32"},
        "parallel": {"pipeline": stages},
        "offload": {"store": str(store / "stores"), "reader": "threads", "slots": 2},
        "engine": {
            "kv_memory": room * _KV_BYTES,
            "block_tokens": BLOCK_TOKENS,
            "max_batch_tokens": REQUESTS * PROMPT_TOKENS,
            "max_requests": REQUESTS,
            "max_model_len": BLOCK_TOKENS,
        },
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


def measure(config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One start; the first pass is not counted."""
    prompts = [[(7 * number + 3 * index) % 500 + 5 for index in range(PROMPT_TOKENS)] for number in range(REQUESTS)]
    params = SamplingParams(max_tokens=options.new_tokens, temperature=0, ignore_eos=True)
    with LLM(config) as llm:
        llm.generate(prompts[:1], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        before, started = llm.stream_reports(), time.monotonic()
        outputs = llm.generate(prompts, params)
        seconds = time.monotonic() - started
        after, plan = llm.stream_reports(), llm.plan
    read = [end.bytes_read - start.bytes_read for start, end in zip(before, after, strict=True)]
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "steps_in_flight": plan.max_steps_in_flight,
        "nodes": len({rank.node for rank in plan.ranks}),
        "kv_blocks": plan.num_kv_blocks,
        "streamed_bytes_per_pass": [rank.streamed_bytes_per_pass for rank in plan.ranks],
        "seconds": seconds,
        "tokens_per_s": sum(map(len, tokens)) / seconds,
        "disk_busy": [count / (options.rate * seconds) for count in read],
        "tokens": tokens,
    }


if __name__ == "__main__":
    sys.exit(main())
