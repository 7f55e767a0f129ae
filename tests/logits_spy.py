"""Logits of a run in this process, taken where they reach the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dist_infer import LLM, SamplingParams
from dist_infer.engine.scheduler import SchedulerConfig
from dist_infer.worker import stage_runner


def captured_logits(
    config: dict[str, Any], prompts: Sequence[list[int]], new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """Every logits tensor of a greedy run, in order.

    The same steps whatever the plan: how many micro-batches and steps in flight there are depends on what is streamed.
    """
    return [logits for logits, _ in _greedy_run(config, prompts, new_tokens, monkeypatch)]


def logits_of_requests(
    config: dict[str, Any], prompts: Sequence[list[int]], new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """For each prompt of a greedy run the logits [new_tokens, vocab] that its tokens were taken from."""
    rows: dict[str, list[torch.Tensor]] = {}
    for logits, request_ids in _greedy_run(config, prompts, new_tokens, monkeypatch):
        for request_id, row in zip(request_ids, logits, strict=True):
            rows.setdefault(request_id, []).append(row)
    return [torch.stack(rows[request_id]) for request_id in sorted(rows, key=lambda name: (len(name), name))]


def _greedy_run(
    config: dict[str, Any], prompts: Sequence[list[int]], new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[torch.Tensor, Sequence[str]]]:
    seen: list[tuple[torch.Tensor, Sequence[str]]] = []
    sample = stage_runner.sample

    def spy(logits: torch.Tensor, request_ids: Sequence[str], *rest: Any) -> Any:
        seen.append((logits.clone(), request_ids))
        return sample(logits, request_ids, *rest)

    def same_steps(**values: Any) -> SchedulerConfig:
        return SchedulerConfig(**{**values, "max_steps_in_flight": 1, "max_micro_batches": 2})

    with monkeypatch.context() as patch:
        patch.setattr("dist_infer.gang.SchedulerConfig", same_steps)
        patch.setattr(stage_runner, "sample", spy)
        with LLM(config) as llm:
            params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
            llm.generate([list(prompt) for prompt in prompts], params)
    return seen
