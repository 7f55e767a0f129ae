"""A tiny config of any causal model type: its own default config with small numbers, every kind of layer kept.

Rules go by the name of a key; what a family needs otherwise is in exceptions.json, with the reason. A rule never adds a
key that the family does not have.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dist_infer.model.adapter import transformers_config
from partition.errors import CheckpointError, UnsupportedModelError
from partition.model_spec import text_config
from partition.safetensors_header import parse_json_object

VOCAB = 199  # a prime: no tensor degree divides it
WINDOW = 8  # shorter than the longest prompt, so that a window that is not honoured shows
_LAYERS = 8  # streaming two stages through two slots each saves memory only with more layers than slots
_MOST_LAYERS = 12
_HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM = 64, 4, 2, 16
_EXPERTS = 8
_POSITIONS = 512

# key -> its value. A size of the model is that value; any other number is that at most, since a smaller one (no window,
# one expert group) says something about the family.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), _LAYERS
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"), _LAYERS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "emb_dim"), _HIDDEN),
    **dict.fromkeys(("attention_hidden_size", "embedding_dim"), _HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"), _HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "index_n_heads"), _HEADS),
    **dict.fromkeys(("linear_num_value_heads",), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), _KV_HEADS),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "global_head_dim", "swa_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("swa_v_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("index_head_dim", "kv_channels", "query_pre_attn_scalar", "dim_head", "d_kv"), _HEAD_DIM),
    **dict.fromkeys(("d_head", "kv_lora_rank", "attention_head_dim"), _HEAD_DIM),
}
_CEILINGS: dict[str, int] = {
    "num_kv_heads": _KV_HEADS,
    "num_attention_heads_per_layer": _HEADS,
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "laurel_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_n_heads", "gated_norm_rank", "d_rel", "index_topk"), 8),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank", "shared_expert_intermediate_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(
        ("expert_ffn_hidden_size", "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 32
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "dff", "dim_ff", "d_ff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("shared_intermediate_size", "prefix_dense_intermediate_size", "d_inner"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "n_groups"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers", "mamba_n_groups"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "n_token", "n_words"), VOCAB),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "local_attention", "rel_extent", "keep_window_size"), WINDOW),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), WINDOW),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_d_head", "ssm_state_size", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_ssm", "lru_width"), 2 * _HIDDEN),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length"), _POSITIONS),
    **dict.fromkeys(("max_sequence_length", "context_length"), _POSITIONS),
}
_LAYER_COUNTS = tuple(key for key, value in _SIZES.items() if "layer" in key)
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def causal_types() -> list[str]:
    """Every model type that the installed transformers has a causal LM class for, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def text_type(model_type: str) -> str:
    """The type whose config the language model has: of a composite (vision-language) type its text part's.

    The type itself where transformers knows no causal LM of the text part alone, or none of that name.
    """
    if model_type not in CONFIG_MAPPING:
        return model_type
    try:
        text = str(CONFIG_MAPPING[model_type]().get_text_config(decoder=True).model_type)
    except Exception:  # the library's own default is refused by the library; tiny_config has the words for it
        return model_type
    return text if text in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else model_type


def tiny_config(model_type: str) -> PretrainedConfig:
    """A config of the type (of its text part) that builds in milliseconds.

    Raises UnsupportedModelError for a type without a causal LM class, and for one whose config cannot be made small,
    with transformers' own words.
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"model_type {model_type!r}: the installed transformers has no causal LM of that name"
        )
    kind = text_type(model_type)
    exception = exceptions().get(kind, {})
    if "impossible" in exception:
        raise UnsupportedModelError(f"{model_type}: {exception['impossible']}")
    try:
        default = CONFIG_MAPPING[kind](**exception.get("default", {}))
    except Exception as error:  # the library's strict dataclasses raise many kinds
        raise UnsupportedModelError(f"{model_type}: transformers refuses its own default config: {error}") from error
    return _built(kind, shrunk(default.to_dict(), exception.get("set", {})))


def tiny_config_of(config: Mapping[str, Any]) -> PretrainedConfig:
    """The same for a parsed config.json: the model's own flags, ratios and patterns, with small numbers."""
    found = transformers_config(config)
    kind, whole = found.model_type, found.to_dict()
    whole.pop("quantization_config", None)  # tiny weights are written as floats
    whole.pop("tie_word_embeddings")  # always false in what the adapter makes; the checkpoint's own flag counts
    tied = text_config(config).get("tie_word_embeddings")
    if tied is not None:
        whole["tie_word_embeddings"] = tied
    return _built(kind, shrunk(whole, exceptions().get(kind, {}).get("set", {})))


@cache
def exceptions() -> dict[str, dict[str, Any]]:
    """model_type -> {"reason", "set": keys and values after the rules, "default": keys for the default config}, or
    {"impossible": why no tiny config of it can be checked}.
    """
    text = resources.files("dist_infer.check_arch").joinpath("exceptions.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def shrunk(whole: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of a whole config (`to_dict`) with small numbers; `changes` have the last word."""
    changes = changes or {}
    values = {key: _shrink(key, value) for key, value in whole.items()}
    latent = isinstance(whole.get("kv_lora_rank"), int)
    if latent and isinstance(whole.get("num_key_value_heads"), int):
        values["num_key_value_heads"] = _HEADS  # heads are expanded from the latent: as many keys as queries
    if latent and whole.get("head_dim") == whole.get("qk_rope_head_dim"):
        values["head_dim"] = values.get("qk_rope_head_dim")  # what the rotary table is made for
    if isinstance(whole.get("qk_head_dim"), int) and latent:
        values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    if isinstance(whole.get("is_decoder"), bool):
        values["is_decoder"] = True  # an encoder by default; its causal LM class needs it said
    _shrink_rope(values)
    _cut_layer_lists(whole, values, changes)
    values |= changes
    for key in ("architectures", "transformers_version", "_name_or_path", "torch_dtype"):
        values.pop(key, None)
    values["dtype"] = "float32"
    return values


def _shrink(key: str, value: Any) -> Any:
    if key in _SPECIAL_TOKENS:
        return None if value is None else _SPECIAL_TOKENS[key]
    if isinstance(value, list) and (key in _SIZES or key in _CEILINGS):
        return [_shrink(key, item) for item in value]  # one for each layer
    if key == "head_dim" and value is None:
        return _HEAD_DIM
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key.endswith("token_id") and value >= VOCAB:
        return 3
    if key in _SIZES:
        return _SIZES[key] if value > 0 else value
    return min(value, _CEILINGS.get(key, value))


def _shrink_rope(values: dict[str, Any]) -> None:
    """A rope that stretches an original length needs both lengths; its factor stays."""
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    for rope in [parameters, *nested]:
        if not isinstance(rope.get("original_max_position_embeddings"), int):
            continue
        rope["original_max_position_embeddings"] = _POSITIONS // 2  # type: ignore[index]
        for factors in ("long_factor", "short_factor"):
            if isinstance(rope.get(factors), list):
                rope[factors] = rope[factors][: _HEAD_DIM // 2]  # type: ignore[index]


def _cut_layer_lists(whole: Mapping[str, Any], values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """As many layers as show every kind; a list with an entry per layer is cut to that, a missing kind put at its end.

    Layer numbers in lists and dicts beyond the end go.
    """
    names = [key for key in _LAYER_COUNTS if isinstance(whole.get(key), int)]
    if not names:
        return
    before = int(whole[names[0]])
    lists = {key: value for key, value in whole.items() if _is_per_layer(key, value, before)}
    num_layers = changes.get(names[0], _enough_layers(list(lists.values())))
    for key in names:
        values[key] = num_layers
    for key in lists:
        values[key] = _with_every_kind(values[key], num_layers)
    for key, value in whole.items():
        if key not in lists and _are_layer_numbers(key, value):
            values[key] = [number for number in value if number < num_layers]
    by_layer = whole.get("per_layer_config")
    if isinstance(by_layer, Mapping):
        values["per_layer_config"] = {
            layer: {
                key: values[key] if key == "num_key_value_heads" else _shrink(key, value)
                for key, value in entries.items()
            }
            for layer, entries in by_layer.items()
            if int(layer) < num_layers
        }


def _is_per_layer(key: str, value: Any, num_layers: int) -> bool:
    return isinstance(value, list) and len(value) == num_layers and not _are_layer_numbers(key, value)


def _are_layer_numbers(key: str, value: Any) -> bool:
    named = key.endswith(("_idxs", "_layers", "_layer_ids", "_indices")) and key != "no_rope_layers"
    return named and isinstance(value, list) and all(isinstance(item, int) for item in value)


def _enough_layers(lists: list[list[Any]]) -> int:
    kinds: Callable[[list[Any]], set[str]] = lambda entries: {json.dumps(entry) for entry in entries}  # noqa: E731
    for num_layers in range(_LAYERS, _MOST_LAYERS + 1):
        if all(kinds(entries[:num_layers]) == kinds(entries) for entries in lists):
            return num_layers
    return _LAYERS


def _with_every_kind(entries: list[Any], num_layers: int) -> list[Any]:
    kept = list(entries[:num_layers])
    missing = [entry for i, entry in enumerate(entries) if entry not in kept and entry not in entries[:i]]
    room = min(len(missing), num_layers - 1)
    kept = kept[: num_layers - room] + missing[:room]
    while len(kept) < num_layers:  # a model with fewer layers than that: its pattern goes on
        kept.append(entries[len(kept) % len(entries)])
    return kept


def _built(kind: str, values: dict[str, Any]) -> PretrainedConfig:
    try:
        return CONFIG_MAPPING[kind](**{key: value for key, value in values.items() if key != "model_type"})
    except Exception as error:
        raise UnsupportedModelError(f"{kind}: transformers refuses the tiny config: {error}") from error


def is_directory(target: str) -> bool:
    """Whether a target names a model directory rather than a type; a known type's name is the type.

    Raises CheckpointError when it is neither.
    """
    if target in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    if Path(target).is_dir():
        return True
    near = difflib.get_close_matches(target, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise CheckpointError(
        f"{target!r} is no directory, and no type that the installed transformers has a causal LM for{hint}: give a "
        "model type such as llama, or the directory of a model"
    )


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises CheckpointError when there is none or it cannot be read."""
    path = directory / "config.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no config.json: give the directory of a model") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json_object(data, where=str(path))
