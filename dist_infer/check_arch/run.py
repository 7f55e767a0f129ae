"""One run of the real path on a tiny checkpoint: index, shard, pack, stream, page, in chunks, several requests at once.

The engine's own scheduler and executor, without its text: each sampled position comes back with the log-probabilities
of the whole vocabulary, also from other processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_infer.backend import make_backend
from dist_infer.check_arch.layout import Layout
from dist_infer.check_arch.tiny_config import VOCAB
from dist_infer.check_arch.verdict import Position
from dist_infer.config import load_config
from dist_infer.engine.request import Request
from dist_infer.engine.scheduler import Scheduler, SchedulerConfig
from dist_infer.gang import Gang
from dist_infer.gang_state import Step
from dist_infer.messages import SampledToken, SamplingSpec
from dist_infer.sampling_params import SamplingParams
from dist_infer.startup import open_model, plan_run
from partition.errors import BudgetError, DistInferError
from partition.plan import Plan

# Ragged, and longer than windows, chunks, KV blocks and micro-batches; token ids past the special ones.
PROMPTS = tuple(tuple((7 * i + 3 * k) % (VOCAB - 8) + 4 for i in range(n)) for k, n in enumerate((21, 3, 9, 14)))
NEW_TOKENS = 6
_LATE_AFTER = 2  # steps until the last request joins the others
_BLOCK_TOKENS = 4
_BATCH_TOKENS = 8
_MODEL_LEN = 40
_SHARES = (2, 3, 4, 6, 8, 12)  # of the layers' bytes, one of which the streamed layout has not got in memory


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a layout gave. `plan` is the one that ran; `bytes_streamed` were read from disk while it ran."""

    plan: Plan
    positions: tuple[Position, ...]
    bytes_streamed: int


class NotStreamedError(Exception):
    """The tiny model could not be made to stream: a fault of the check, not of the model."""


def run_layout(checkpoint: Path, store: Path, layout: Layout) -> RunResult:
    """Greedy answers to PROMPTS. Stores are shared by layouts of one tensor degree.

    Raises the error tree: a refusal before a byte is loaded is an UnsupportedModelError or ConfigError.
    """
    config = _run_config(checkpoint, store, layout)
    if layout.streamed:
        config["offload"]["host_memory"], config["engine"]["kv_memory"] = streaming_budget(config)
    gang = Gang(load_config(config), _silent)
    try:
        gang.start()
        before = sum(report.bytes_read for report in gang.executor.stream_reports())
        positions = _answer(gang)
        streamed = sum(report.bytes_read for report in gang.executor.stream_reports()) - before
    finally:
        gang.close()
    if layout.streamed and not streamed:
        raise NotStreamedError(f"nothing was read from disk with {config['offload']['host_memory']} bytes of memory")
    return RunResult(plan=gang.plan, positions=tuple(positions), bytes_streamed=streamed)


def streaming_budget(config: dict[str, Any]) -> tuple[int, int]:
    """(host_memory, kv_memory) with which a part of the layers is streamed: as much as there is a plan for."""
    run = load_config(config)
    model = open_model(run)
    backend = make_backend(run.cluster, run.name)
    try:
        facts = backend.facts(with_devices=False, sample=None, dtype=None)
        footprint = backend.footprint(run.parallel.tensor, run.parallel.pipeline)
    finally:
        backend.close()
    whole = plan_run(run, model, facts, footprint)
    kv_bytes = max(rank.kv_bytes for rank in whole.ranks)
    layers = sum(u.num_bytes for rank in whole.ranks for u in rank.units if u.name.startswith("layers"))
    misfit: DistInferError | None = None
    for share in _SHARES:
        budget = whole.budgets[0].used_bytes - layers // share
        trial = {
            **config,
            "offload": {**config["offload"], "host_memory": budget},
            "engine": {**config["engine"], "kv_memory": kv_bytes},
        }
        try:
            plan = plan_run(load_config(trial), model, facts, footprint)
        except BudgetError as error:
            misfit = error
            continue
        if any(rank.streamed_bytes_per_pass for rank in plan.ranks):
            return budget, kv_bytes
    raise NotStreamedError(f"no budget makes this model stream{f': {misfit}' if misfit else ''}")


def _run_config(checkpoint: Path, store: Path, layout: Layout) -> dict[str, Any]:
    return {
        "name": "check-arch",
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "parallel": {"tensor": layout.tensor, "pipeline": layout.pipeline},
        "offload": {"store": str(store), "slots": 2, "reader": "threads"},
        "engine": {
            "block_tokens": _BLOCK_TOKENS,
            "max_batch_tokens": _BATCH_TOKENS,
            "max_requests": len(PROMPTS),
            "max_model_len": _MODEL_LEN,
        },
        "cluster": {"executor": "local", "device": "cpu"},
    }


def _answer(gang: Gang) -> list[Position]:
    plan, executor = gang.plan, gang.executor
    scheduler = Scheduler(
        SchedulerConfig(
            num_kv_blocks=gang.num_kv_blocks,
            block_tokens=plan.block_tokens,
            max_batch_tokens=plan.max_batch_tokens,
            max_micro_batches=plan.max_micro_batches,
            max_requests=plan.max_requests,
            max_model_len=plan.max_model_len,
            max_steps_in_flight=plan.max_steps_in_flight,
        )
    )
    requests = [_request(f"check-{i}", prompt, plan.model.vocab_size) for i, prompt in enumerate(PROMPTS)]
    late = [requests.pop()]
    for request in requests:
        scheduler.add(request)
    positions: list[Position] = []
    while scheduler.has_requests:
        if late and scheduler.num_steps >= _LATE_AFTER:
            scheduler.add(late.pop())
        while (step := scheduler.schedule()) is not None:
            executor.submit(step)
        for request, token in scheduler.apply(executor.collect(gang.step_timeout_s)):
            positions.append(_position(request, token, plan.model.vocab_size))
            if request.num_output_tokens == NEW_TOKENS:
                scheduler.finish(request)
    scheduler.integrity()
    return positions


def _request(request_id: str, prompt: Sequence[int], vocab_size: int) -> Request:
    return Request(
        id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True),
        sampling=SamplingSpec(temperature=0.0, num_logprobs=vocab_size),
    )


def _position(request: Request, token: SampledToken, vocab_size: int) -> Position:
    logprobs = [float("nan")] * vocab_size  # a token that did not come back is an error
    for token_id, value in token.top_logprobs:
        logprobs[token_id] = value
    return Position(prefix=tuple(request.token_ids[:-1]), token_id=token.token_id, logprobs=tuple(logprobs))


def _silent(step: Step) -> None:
    """Nobody watches a run of a second."""
