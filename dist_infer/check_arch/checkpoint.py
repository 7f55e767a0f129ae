"""A tiny model with random weights, written the way published checkpoints are: safetensors in several files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from partition.errors import UnsupportedModelError

SEED = 20_26
# Far from the library's own 0.02, so that a layer that is wrong shows in the logits; from 0.15 on eight layers of some
# families (gated delta nets, routers) make more than the tolerance of float32's own rounding.
_MATRIX_STD = 0.1
_VECTOR_STD = 0.1
_FILES = 2


def write_checkpoint(config: PretrainedConfig, directory: Path) -> str:
    """Write config and weights (fp32, seeded) into the directory; returns the name of the model class.

    Raises UnsupportedModelError with transformers' own words where it cannot build or save the model.
    """
    torch.manual_seed(SEED)
    random.seed(SEED)
    try:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception as error:  # whatever a model class raises
        raise UnsupportedModelError(f"transformers cannot build it: {type(error).__name__}: {error}") from error
    with torch.no_grad():
        randomise(model)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    try:
        model.save_pretrained(directory, max_shard_size=max(-(-num_bytes // _FILES), largest))
    except Exception as error:
        raise UnsupportedModelError(f"transformers cannot save it: {type(error).__name__}: {error}") from error
    return type(model).__name__


def randomise(model: Any) -> None:
    """Matrices at random, vectors (norms, biases, routers' corrections) around what the library starts them with."""
    stored = set(model.state_dict().keys())
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, _MATRIX_STD)
        else:
            parameter.add_(torch.randn_like(parameter) * _VECTOR_STD)
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and buffer.ndim == 1:
            buffer.add_(torch.randn_like(buffer) * _VECTOR_STD)
