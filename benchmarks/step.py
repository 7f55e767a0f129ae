"""Milliseconds of a decode step in one process, and where they go.

Run: python benchmarks/step.py FILE [--batch 8] [--profile]

Runs the ranks of the file's plan (tensor 1) without engine, Ray or HTTP. A step of B requests, one token each.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time

from dist_infer.backend import RankSpec, make_backend
from dist_infer.config import load_config
from dist_infer.messages import Chunk, NewRequest, RequestDiff, SamplingSpec, StepPlan
from dist_infer.startup import open_model, pack_model, plan_run
from dist_infer.worker.rank_host import RankHost


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    config = load_config(arguments.file, ["cluster.executor=local", "parallel.tensor=1", *arguments.set])
    model = open_model(config)
    backend = make_backend(config.cluster, config.name)
    facts = backend.facts(with_devices=False, sample=None, dtype=None)
    plan = plan_run(config, model, facts, backend.footprint(1, config.parallel.pipeline))
    store, _ = pack_model(config, model, lambda _: None)
    spec = RankSpec(
        readers=("threads",) * len(plan.budgets),
        plan=plan,
        config_json=json.dumps(model.index.config),
        stores=dict.fromkeys(range(len(plan.budgets)), store),
        verify="first",
        step_timeout_s=60,
    )
    ranks = tuple(range(plan.pipeline))
    host = RankHost(spec.setup(ranks, ("cpu",) * len(ranks), arguments.threads))
    host.load(lambda _done, _total: None)

    blocks = -(-(arguments.context + arguments.steps + 1) // plan.block_tokens)
    prompts = [
        NewRequest(str(i), (5,) * arguments.context, tuple(range(i * blocks, (i + 1) * blocks)), SamplingSpec())
        for i in range(arguments.batch)
    ]
    prefill = tuple((Chunk(p.request_id, 0, arguments.context, True),) for p in prompts)
    tokens = host.step(StepPlan(0, prefill, new=tuple(prompts)))
    profile, times = cProfile.Profile(), []
    for step in range(1, arguments.steps + 1):
        if tokens is None:
            raise RuntimeError("the last stage is not here")
        diffs = tuple(RequestDiff(t.request_id, (t.token_id,), ()) for t in tokens.tokens)
        chunks = tuple(Chunk(t.request_id, arguments.context + step - 1, 1, True) for t in tokens.tokens)
        started = time.perf_counter()
        if arguments.profile:
            profile.enable()
        tokens = host.step(StepPlan(step, (chunks,), diffs=diffs))
        profile.disable()
        times.append(1e3 * (time.perf_counter() - started))
    reports = host.stream_reports()
    stall = sum(r.stall_s for r in reports)
    streamed = sum(r.streamed_bytes_per_pass for r in plan.ranks)
    print(
        f"batch {arguments.batch}: median {statistics.median(times):.1f} ms a step, stalls "
        f"{1e3 * stall / (len(times) + 1):.1f} ms a step, {streamed / 1e6:.0f} MB streamed a pass"
    )
    host.close()
    if arguments.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
