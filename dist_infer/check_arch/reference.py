"""What is right: transformers' eager forward in fp32, without a cache, from the whole sequence each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from partition.errors import UnsupportedModelError


class Reference:
    """Owns the library's model of a checkpoint. Answers are kept by prefix: layouts sample the same ones."""

    def __init__(self, directory: Path) -> None:
        try:
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
            ).eval()
        except Exception as error:  # whatever a model class raises
            raise UnsupportedModelError(f"transformers cannot load it: {type(error).__name__}: {error}") from error
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def logprobs(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """[vocab] float64 log-probabilities of the token after these.

        Raises UnsupportedModelError where transformers itself cannot compute them, or they are not finite.
        """
        if token_ids not in self._known:
            self._known[token_ids] = self._computed(token_ids)
        return self._known[token_ids]

    def _computed(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        try:
            with torch.inference_mode():
                logits = self._model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]
        except Exception as error:
            raise UnsupportedModelError(f"transformers cannot run it: {type(error).__name__}: {error}") from error
        if logits.isnan().any():
            raise UnsupportedModelError("transformers' own logits are not numbers")
        return torch.log_softmax(logits.double(), dim=-1)
