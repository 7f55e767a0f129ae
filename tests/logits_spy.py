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
    seen: list[torch.Tensor] = []
    sample = stage_runner.sample

    def spy(logits: torch.Tensor, *rest: Any) -> Any:
        seen.append(logits.clone())
        return sample(logits, *rest)

    def same_steps(**values: Any) -> SchedulerConfig:
        return SchedulerConfig(**{**values, "max_steps_in_flight": 1, "max_micro_batches": 2})

    with monkeypatch.context() as patch:
        patch.setattr("dist_infer.llm.SchedulerConfig", same_steps)
        patch.setattr(stage_runner, "sample", spy)
        with LLM(config) as llm:
            params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
            llm.generate([list(prompt) for prompt in prompts], params)
    return seen
