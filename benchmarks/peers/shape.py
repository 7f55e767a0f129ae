"""The dimensions of the checkpoint that all peers run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

CONTEXT = 4096
ROPE_THETA = 10000.0
EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's dimensions. `name` is the folder's."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    seed: int = 0

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) in the order of their use."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (self.heads * self.head_dim, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (self.kv_heads * self.head_dim, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (self.kv_heads * self.head_dim, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.heads * self.head_dim)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    @property
    def num_bytes(self) -> int:
        """In bfloat16."""
        return 2 * sum(math.prod(shape) for _, shape in self.parameters())

    def config(self) -> dict[str, object]:
        """config.json, as transformers reads it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": EPSILON,
            "rope_theta": ROPE_THETA,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            "dtype": "bfloat16",
        }


# 4.86 GB in bfloat16: more than the 3 GiB of the runs, less than that in int4 or Q4_0
FULL = Shape(
    name="llama-4.9gb", hidden=2560, intermediate=7168, layers=32, heads=20, kv_heads=4, head_dim=128, vocab=32000
)
TINY = Shape(name="llama-tiny", hidden=256, intermediate=704, layers=4, heads=4, kv_heads=2, head_dim=64, vocab=1024)
SHAPES = {"full": FULL, "tiny": TINY}
