"""How far log-probabilities in half precision are from transformers' in float32, on small models of a family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from thread_ranks import logits_of
from transformers import AutoModelForCausalLM

IDS = [(11 * i + i * i) % 151 + 3 for i in range(48)]
CUTS = (7, 16, 40, 41)  # prompts come in chunks, answers in single tokens
NUM_SEEDS = 5  # of weights: of one alone the ratio of two errors says little


def models_of(family: str, tiny_checkpoint: Callable[..., Path]) -> list[Path]:
    """Checkpoints that differ in their weights; short ones, where an expert that is chosen otherwise is rare."""
    changes: dict[str, Any] = {"num_hidden_layers": 2}
    changes |= {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "gpt_oss" else {}
    return [tiny_checkpoint(family, seed=seed, **changes) for seed in range(NUM_SEEDS)]


@cache
def eager_logits(path: Path, dtype: torch.dtype, attention: str = "eager") -> torch.Tensor:
    """[len(IDS), vocab] of transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([IDS]), use_cache=False).logits[0]
    return logits


@cache
def own_logits(path: Path, dtype: torch.dtype, tensor: int = 1) -> torch.Tensor:
    """The same of our model path, chunk by chunk over its KV cache."""
    return logits_of(path, IDS, tensor=tensor, dtype=dtype, cuts=CUTS)


def typical_error(logits: list[torch.Tensor], references: list[torch.Tensor]) -> float:
    """Median over positions and models of ‖log p - log p of the reference‖ / ‖log p of the reference‖."""
    errors = []
    for found, wanted in zip(logits, references, strict=True):
        ours, exact = found.float().log_softmax(-1), wanted.float().log_softmax(-1)
        errors.append((ours - exact).norm(dim=-1) / exact.norm(dim=-1))
    return float(torch.cat(errors).median())
