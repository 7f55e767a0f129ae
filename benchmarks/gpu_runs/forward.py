"""Greedy decoding by transformers' own forward, for competitors that leave the model class as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from job import clock
from safetensors import safe_open
from transformers import DynamicCache


def weights(model: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the checkpoint, one at a time; the tensor is the file's memory: copy it."""
    with safe_open(Path(model) / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            yield name, file.get_tensor(name)


@torch.no_grad()
def decode(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, device: str
) -> tuple[list[float], list[list[int]]]:
    """(times at which the decode passes ended, new tokens by sequence). The prompt's pass gives the first token."""
    cache = DynamicCache()
    ids = torch.tensor(prompts, device=device)
    ends: list[float] = []
    rows: list[list[int]] = []
    for number in range(new_tokens):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        rows.append(ids[:, 0].tolist())
        if number:
            ends.append(clock())
    return ends, [list(sequence) for sequence in zip(*rows, strict=True)]
