"""GGUF metadata to the config.json it stands for."""

from __future__ import annotations

from typing import Any

from partition.errors import CheckpointError, UnsupportedModelError
from partition.families import family_of
from partition.gguf_header import GgufHeader

_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_TOKEN_KEYS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
# the 27B models scale queries by hidden/heads where the smaller ones use head_dim; the metadata does not say it
_LAYERS_WITH_WIDE_QUERY_SCALE = {"gemma2": 46, "gemma3": 62}


def config_of(header: GgufHeader, *, file: str) -> dict[str, Any]:
    """A config as transformers would have it. Raises UnsupportedModelError for what would be computed wrongly."""
    metadata, names = header.metadata, {tensor.name: tensor for tensor in header.tensors}
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise CheckpointError(f"{file}: the metadata has no general.architecture, so the model family is unknown")
    if arch not in _MODEL_TYPES:
        raise UnsupportedModelError(
            f"{file}: GGUF architecture {arch[:100]!r} is not supported; supported: {', '.join(sorted(_MODEL_TYPES))}"
        )
    if metadata.get("split.count", 0) not in (0, 1):
        raise UnsupportedModelError(f"{file} is one part of a split GGUF: merge the parts into one file")
    if any("rope_f" in name for name in names):
        raise UnsupportedModelError(
            f"{file} carries rotary factors as a tensor (rope_freqs or rope_factors), which the model class cannot "
            f"take: use the safetensors checkpoint of this model"
        )
    model_type = _MODEL_TYPES[arch]
    config: dict[str, Any] = {}
    for key, name in _KEYS.items():
        value = metadata.get(f"{arch}.{key}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnsupportedModelError(
                f"{file}: {arch}.{key} is not one number, so the layers differ among themselves"
            )
        config[name] = value
    if config.get("num_experts") and arch == "llama":
        model_type, config["num_local_experts"] = "mixtral", config.pop("num_experts")
    if model_type == "qwen3_moe":
        config["norm_topk_prob"] = True  # the format has no key for it: its runtimes always normalise
    if "head_dim" not in config and arch == "llama" and isinstance(metadata.get("llama.rope.dimension_count"), int):
        config["head_dim"] = metadata["llama.rope.dimension_count"]
    if heads := config.get("num_attention_heads"):
        # what GGUF leaves out is derived from the heads, where the model class may have a number of its own
        config.setdefault("num_key_value_heads", heads)
        config.setdefault("head_dim", config.get("hidden_size", 0) // heads)
        if _LAYERS_WITH_WIDE_QUERY_SCALE.get(arch, 0) == config.get("num_hidden_layers"):
            config["query_pre_attn_scalar"] = config.get("hidden_size", 0) // heads
    if "attention_bias" in family_of(model_type)["flags"]:
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    embedding = names.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file} has no matrix token_embd.weight")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in names
    config |= {
        name: metadata[f"tokenizer.ggml.{key}"]
        for key, name in _TOKEN_KEYS.items()
        if isinstance(metadata.get(f"tokenizer.ggml.{key}"), int)
    }
    scaling = metadata.get(f"{arch}.rope.scaling.type")
    if scaling not in (None, "none"):
        if scaling != "linear" or not isinstance(metadata.get(f"{arch}.rope.scaling.factor"), (int, float)):
            raise UnsupportedModelError(f"{file}: rope scaling {str(scaling)[:50]!r} of a GGUF is not supported")
        config["rope_scaling"] = {"rope_type": "linear", "factor": metadata[f"{arch}.rope.scaling.factor"]}
    return {"architectures": [family_of(model_type)["architecture"]], "model_type": model_type, **config}


def gguf_architecture(model_type: str) -> str:
    """The `general.architecture` that files of this model type have."""
    return {"mixtral": "llama", **{kind: arch for arch, kind in _MODEL_TYPES.items()}}[model_type]
