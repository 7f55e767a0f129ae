"""A checkpoint of several gigabytes, made in seconds: real headers, and the same random block over and over."""

from __future__ import annotations

import json
from pathlib import Path

import torch

BLOCK_BYTES = 64 << 20
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2560, 6912, 32, 20, 4, 128, 32000
BYTES = 2 * (
    2 * VOCABULARY * HIDDEN
    + LAYERS * HIDDEN * (2 * HEADS * HEAD_DIM + 2 * KV_HEADS * HEAD_DIM + 3 * INTERMEDIATE + 2)
    + HIDDEN
)
"""4.7 GB in bfloat16."""


def write_large_llama(directory: Path) -> Path:
    """config.json and model.safetensors: what a run of it computes is of no use, what it moves is."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    header, position = {}, 0
    for name, shape in _tensors():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        block = (0.02 * torch.randn(BLOCK_BYTES // 2, generator=torch.Generator().manual_seed(0))).bfloat16()
        data = block.view(torch.uint8).numpy().data
        for start in range(0, position, BLOCK_BYTES):
            file.write(data[: min(BLOCK_BYTES, position - start)])
    return directory


def _tensors() -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}."
        found += [(f"{stem}{norm}_layernorm.weight", (HIDDEN,)) for norm in ("input", "post_attention")]
        found += [(f"{stem}self_attn.{part}_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)) for part in "kv"]
        found += [
            (f"{stem}self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN)),
            (f"{stem}self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)),
            (f"{stem}mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)),
            (f"{stem}mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)),
            (f"{stem}mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)),
        ]
    return [*found, ("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]
