"""Sums over CPU ranks of this machine: shared memory against gloo.

    python -m dist_infer.build_ops          once
    python benchmarks/allreduce.py [--ranks 2] [--dtype bfloat16]

Both ways in the same processes, a block of each in turn; each sum is timed by itself on rank 0, and the medians are
printed as JSON, in microseconds. With fewer cores than ranks it measures the kernel's scheduler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from dist_infer.worker import collectives
from dist_infer.worker.collectives import TensorGroup

HOST = "127.0.0.1"
TIMEOUT_S = 60.0
SIZES = (1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
BLOCKS = 10
PER_BLOCK = {1 << 20: 10, 4 << 20: 5}  # of large ones; 50 of others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(measure(options)))
        return
    store, port = collectives.bind_rendezvous(HOST, options.ranks, TIMEOUT_S)
    command = [sys.executable, __file__, "--ranks", str(options.ranks), "--dtype", options.dtype, "--port", str(port)]
    started = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(options.ranks)
    ]
    found = [json.loads(process.communicate(timeout=600)[0]) for process in started]
    del store  # the ranks needed it until now
    print(json.dumps({"ranks": options.ranks, "dtype": options.dtype, "median_us": found[0]}, indent=1))


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    store = collectives.join_rendezvous(HOST, options.port, options.ranks, TIMEOUT_S)
    group, _ = collectives.connect(
        store=store,
        own_host=HOST,
        rank=options.rank,
        tensor=options.ranks,
        stages=1,
        device="cpu",
        timeout_s=TIMEOUT_S,
    )
    assert isinstance(group, TensorGroup)
    if group.sums != "sums in shared memory":
        raise SystemExit(f"nothing to compare: {group.sums}")
    ways = {"shared memory": group, "gloo": TensorGroup(group._group, range(options.ranks), options.rank)}
    found = {}
    for size in SIZES:
        tensor = torch.ones(size // getattr(torch, options.dtype).itemsize, dtype=getattr(torch, options.dtype))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(BLOCKS):
            for name, way in ways.items():
                for number in range(PER_BLOCK.get(size, 50) + 1):
                    tensor.fill_(1.0)
                    started = time.perf_counter()
                    way.all_reduce(tensor)
                    if number:  # the first one waits for ranks that are still at the other way
                        seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) * 1e6 for name, values in seconds.items()}
        found[f"{size // 1024} KiB"] = {**medians, "times faster": medians["gloo"] / medians["shared memory"]}
    collectives.disconnect()
    return found


if __name__ == "__main__":
    main()
