"""The checkpoint that all peers run: a seeded random Llama as sharded safetensors, and its GGUF forms made from them.

    work/models/NAME/safetensors/    config.json, generation_config.json, model-0000i-of-n.safetensors with their index
    work/models/NAME/bf16.gguf, q8_0.gguf, q4_0.gguf

Written shard by shard and tensor by tensor in about 1 GiB of memory, under temporary names: a file under its own name
is complete. Prompts are token ids, so there is no tokenizer, and the GGUF files say so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from peers.shape import CONTEXT, EPSILON, ROPE_THETA, Shape

SHARD_BYTES = 512 << 20
GGUF_TYPES = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_PART_ELEMENTS = 8 << 20  # of a tensor that is quantized at a time


def write_checkpoint(shape: Shape, folder: Path, say: Callable[[str], None]) -> None:
    """The safetensors form. Does nothing where it is complete."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, dims in shape.parameters():
        num_bytes = 2 * math.prod(dims)
        if held + num_bytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append((name, dims))
        held += num_bytes
    generator = torch.Generator().manual_seed(shape.seed)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {name: _random(name, dims, shape, generator) for name, dims in shard},
            folder / f"{file}.tmp",
            {"format": "pt"},
        )
        (folder / f"{file}.tmp").rename(folder / file)
        where |= {name: file for name, _ in shard}
        say(f"{shape.name}: {file}")
    index = {"metadata": {"total_size": shape.num_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "pad_token_id": 0}))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))


def write_gguf(shape: Shape, source: Path, target: Path, kind: str, say: Callable[[str], None]) -> None:
    """One GGUF form of the checkpoint in `source`: matrices in `kind`, norms in float32. Nothing where it is there.

    The head is in `kind` as well, which makes a step of the peer cheaper than the usual choice (Q6_K) would.
    """
    if target.is_file():
        return
    weights, file_type = GGUF_TYPES[kind]
    temporary = target.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_name(shape.name)
    writer.add_file_type(file_type)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")
    for name, dims in shape.parameters():
        kept = weights if len(dims) == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quant_shape_to_byte_shape(dims, kept) if len(dims) == 2 else dims
        num_bytes = math.prod(stored) if len(dims) == 2 else 4 * math.prod(dims)
        np_type = np.dtype(np.uint8 if len(dims) == 2 else np.float32)
        writer.add_tensor_info(_gguf_name(name), stored, np_type, num_bytes, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    where: dict[str, str] = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    for name, dims in shape.parameters():
        with safe_open(source / where[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleave_rotary(tensor, shape.head_dim)
        writer.write_tensor_data(_converted(tensor, weights if len(dims) == 2 else None))
    writer.close()
    temporary.rename(target)
    say(f"{shape.name}: {target.name}, {target.stat().st_size / 1e9:.2f} GB")


def interleave_rotary(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [heads · head_dim, ..] from rotary halves (transformers) to rotary pairs (llama.cpp)."""
    pairs = weight.view(-1, 2, head_dim // 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _random(name: str, dims: Sequence[int], shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Of a size that keeps activations near 1, so that number formats are tried where real models have their values.

    What layers add is scaled down by their number: otherwise a deep random network turns the last bit of a rounding
    into other tokens, and nobody could see that the peers compute the same model.
    """
    if len(dims) == 1:
        return torch.ones(*dims, dtype=torch.bfloat16)
    size = 1.0 if "embed" in name else dims[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        size *= (2 * shape.layers) ** -0.5
    return torch.randn(*dims, generator=generator).mul_(size).to(torch.bfloat16)


def _converted(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType | None) -> NDArray[np.generic]:
    if kind is None:
        array: NDArray[np.generic] = tensor.float().numpy()
        return array
    if kind == gguf.GGMLQuantizationType.BF16:
        return tensor.contiguous().view(torch.uint8).numpy()
    rows = max(1, _PART_ELEMENTS // tensor.shape[1])
    parts = [gguf.quants.quantize(part.float().numpy(), kind) for part in torch.split(tensor, rows)]
    return np.concatenate(parts)


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }[name]
