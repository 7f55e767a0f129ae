"""GGUF files as llama.cpp's converter writes them, from tiny checkpoints: its names, row order and norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoModelForCausalLM

from benchmarks.gguf_loss import write_gguf

ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}


def name_map(model_type: str, num_layers: int) -> Any:
    """The gguf package's own table of names."""
    architecture = ARCHITECTURES[model_type]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(kind, num_layers)


def named_tensors(model_type: str, parameter: str, num_layers: int) -> list[str]:
    """What the gguf package calls the tensors of a parameter; packed gate and up of experts are two there."""
    names = name_map(model_type, num_layers)
    if parameter.endswith("experts.gate_up_proj"):
        stem = parameter.removesuffix("gate_up_proj")
        return [f"{names.get_name(stem + leaf)}.weight" for leaf in ("gate_proj", "up_proj")]
    if parameter.endswith("experts.down_proj"):
        return [f"{names.get_name(parameter)}.weight"]
    stem, _, suffix = parameter.rpartition(".")
    return [f"{names.get_name(stem)}.{suffix}"]


def llama_order(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The converter's order of the rows of q and k: both halves of a head interleaved."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def convert(checkpoint: Path, to: Path, kind_of: Callable[[str], str] = lambda name: "F32") -> Path:
    """A checkpoint as a GGUF file, each matrix in the type that `kind_of` says for its tensor's name."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = model.config
    content: dict[str, tuple[str, np.ndarray]] = {}
    for parameter, tensor in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        names = named_tensors(config.model_type, parameter, config.num_hidden_layers)
        values = np.split(tensor.float().numpy(), len(names), axis=-2) if len(names) > 1 else [tensor.float().numpy()]
        for name, array in zip(names, values, strict=True):
            if ARCHITECTURES[config.model_type] == "llama" and (".attn_q." in name or ".attn_k." in name):
                heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
                array = llama_order(array, heads)
            if config.model_type.startswith("gemma") and "norm" in name:
                array = array + 1
            plain = array.ndim < 2 or not name.startswith("blk.") or "gate_inp" in name
            kind = "F32" if plain else kind_of(name)
            blocks = gguf.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType[kind])
            content[name] = (kind, blocks.view(np.uint8))
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if getattr(config, "head_dim", None):
        metadata["attention.key_length"] = config.head_dim
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        metadata |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        if config.model_type == "qwen3_moe":
            metadata["expert_feed_forward_length"] = config.moe_intermediate_size
    return write_gguf(to, ARCHITECTURES[config.model_type], metadata, content)
