"""The run file of a tiny engine that does everything: chunked prefill, ragged batches, paged KV, streamed weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dist_infer import load_config
from dist_infer.backend import make_backend
from dist_infer.startup import open_model, plan_run

PROMPTS = [[(7 * i + 3 * k) % 157 + 3 for i in range(n)] for k, n in enumerate((21, 3, 9))]


def run_config(
    path: Path, store: Path, *, streamed: bool, tensor: int = 1, pipeline: int = 1, dtype: str = "auto"
) -> dict[str, Any]:
    """max_batch_tokens 8 cuts the longest prompt into chunks; KV blocks of 4 tokens."""
    config: dict[str, Any] = {
        "model": {"path": str(path), "dtype": dtype},
        "parallel": {"tensor": tensor, "pipeline": pipeline},
        "offload": {"store": str(store), "slots": 2},
        "engine": {
            "kv_memory": 600_000,
            "block_tokens": 4,
            "max_batch_tokens": 8,
            "max_requests": 4,
            "max_model_len": 48,
        },
        "cluster": {"executor": "local", "device": "cpu"},
    }
    if streamed:
        config["offload"]["host_memory"] = streaming_budget(config)
    return config


def streaming_budget(config: dict[str, Any]) -> int:
    """Bytes that hold everything but a part of the layers of this config."""
    run = load_config(config)
    backend = make_backend(run.cluster, run.name)
    facts = backend.facts(with_devices=False, sample=None, dtype=None)
    plan = plan_run(run, open_model(run), facts, backend.footprint(run.parallel.tensor, run.parallel.pipeline))
    layers = sum(u.num_bytes for rank in plan.ranks for u in rank.units if u.name.startswith("layers"))
    return plan.budgets[0].used_bytes - layers // 3


def greedy_reference(
    path: Path, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens of transformers for each prompt, and its logits [new_tokens, vocab] at each of them; float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, logits = [], []
    for prompt in prompts:
        ids, rows = list(prompt), []
        with torch.inference_mode():
            for _ in range(new_tokens):
                rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
                ids.append(int(rows[-1].argmax()))
        tokens.append(ids[len(prompt) :])
        logits.append(torch.stack(rows))
    return tokens, logits
