"""What a model is, from its config.json alone: dimensions, layer kinds, flags. No weights, no model classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from partition.config_keys import ConfigKeys
from partition.errors import ConfigError, UnsupportedModelError
from partition.families import family_of
from partition.windows import windows_of


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A causal language model.

    `layer_kinds[i]` ("dense" | "moe") picks the parameter table of layer i. `dims` has every dimension that the table
    of the family names, in elements. `head_dim` is the width of one query or key head, `v_head_dim` of one value head.
    `windows[i]`: the last positions that layer i attends to, None for all; empty where no layer has a window.
    `table`: the parameters of a type that families.json does not have, in its form; it is cut in stages only.
    `state_elements`: of float32 that a sequence keeps in all layers whatever its length (recurrent states).
    `kv_elements[i]`: what layer i keeps of a token in the library's own cache; empty on the packed path.
    `path`: "packed": all sequences of a step in one row, over paged KV; "fallback": each by itself, over its own cache;
    "stepwise": so, and what follows a sequence's first chunk token by token (states that take one token at a time).
    """

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    max_position: int
    tied: bool
    layer_kinds: tuple[str, ...]
    dims: dict[str, int]
    flags: dict[str, bool]
    windows: tuple[int | None, ...] = ()
    path: Literal["packed", "fallback", "stepwise"] = "packed"
    state_elements: int = 0
    kv_elements: tuple[int, ...] = ()
    table: dict[str, Any] | None = None

    @property
    def family(self) -> Mapping[str, Any]:
        """Its entry in the family table, or its own."""
        return self.table if self.table is not None else family_of(self.model_type)

    @property
    def latent_dim(self) -> int:
        """Elements that latent attention keeps of a token (compressed KV and rotary key, for all heads); else 0."""
        return self.dims.get("kv_a_width", 0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """The spec of a parsed config.json; of a composite (vision-language) config its text part.

        Raises UnsupportedModelError for an unknown family and ConfigError for a missing or senseless key.
        """
        text = text_config(config)
        model_type = text.get("model_type")
        if not isinstance(model_type, str):
            raise ConfigError("config.json has no 'model_type', so the model family is unknown")
        family = family_of(model_type)
        refuse_bidirectional(text)
        keys = ConfigKeys(text, family["defaults"], model_type)
        num_layers, num_heads = keys.count("num_hidden_layers"), keys.count("num_attention_heads")
        hidden, vocab = keys.count("hidden_size"), keys.count("vocab_size")
        latent = family["layer_rule"] == "first_k_dense"  # those families compress KV; heads are expanded from a latent
        num_kv_heads = num_heads if latent else keys.count("num_key_value_heads", absent=num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        dims = {"hidden": hidden, "vocab": vocab, "heads": num_heads}
        if latent:
            nope, rope = keys.count("qk_nope_head_dim"), keys.count("qk_rope_head_dim")
            head_dim, v_head_dim = nope + rope, keys.count("v_head_dim")
            dims |= {"kv_lora": keys.count("kv_lora_rank"), "kv_a_width": keys.count("kv_lora_rank") + rope}
            dims |= {"q_b_width": num_heads * head_dim, "kv_b_width": num_heads * (nope + v_head_dim)}
            dims |= {"o_width": num_heads * v_head_dim}
            if keys.get("q_lora_rank") is not None:
                dims["q_lora"] = keys.count("q_lora_rank")
        else:
            if keys.get("head_dim") is None and hidden % num_heads:
                raise ConfigError(
                    f"config.json has no 'head_dim' and hidden_size {hidden} is no multiple of {num_heads} heads"
                )
            head_dim = v_head_dim = keys.count("head_dim", absent=hidden // num_heads)
            dims |= {"head_dim": head_dim, "q_width": num_heads * head_dim, "kv_width": num_kv_heads * head_dim}
            dims["qkv_width"] = dims["q_width"] + 2 * dims["kv_width"]
        layer_kinds = tuple(_LAYER_RULES[family["layer_rule"]](keys, num_layers))
        windows = windows_of(keys, num_layers)
        dims |= _mlp_dims(keys, family["layer_rule"], layer_kinds)
        flags = {name: "q_lora" in dims if name == "q_lora" else keys.flag(name) for name in family["flags"]}
        return cls(
            model_type=model_type,
            num_layers=num_layers,
            hidden_size=hidden,
            vocab_size=vocab,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            max_position=_max_position(keys),
            # some composite configs say it only at the top
            tied=keys.flag("tie_word_embeddings", config.get("tie_word_embeddings")),
            layer_kinds=layer_kinds,
            dims=dims,
            flags=flags,
            windows=windows if any(windows) else (),
        )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: `text_config` of a composite one, else the config itself."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"config.json is not an object but {type(config).__name__}")
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise ConfigError("config.json: 'text_config' is not an object")
    return text


def refuse_bidirectional(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError where text attends to what comes after it. config: the language model's part.

    "vision" (of Gemma 4) is about image tokens alone.
    """
    asked = config.get("use_bidirectional_attention")
    if asked and asked != "vision":
        raise UnsupportedModelError(
            f"config.json has use_bidirectional_attention: {asked!r}, so its tokens attend to those after them, as in "
            "a model for embeddings; only models that generate text token by token are run"
        )


def longest_position(config: Mapping[str, Any], model_type: str, most: int) -> int:
    """`most`, or less where longer sequences would not be computed right. config: the text part."""
    return _longest(ConfigKeys(config, {}, model_type), most)


def _max_position(keys: ConfigKeys) -> int:
    return _longest(keys, keys.count("max_position_embeddings"))


def _longest(keys: ConfigKeys, most: int) -> int:
    """The longest sequence that is computed right.

    longrope has two sets of frequencies and takes the long one when any position of a batch is past the original
    length, so a long sequence would change its neighbours' numbers: such a model is served up to its original length.
    """
    declared = [keys.get("rope_parameters"), keys.get("rope_scaling")]
    ropes = [rope for rope in declared if isinstance(rope, Mapping)]
    ropes += [inner for rope in ropes for inner in rope.values() if isinstance(inner, Mapping)]  # one per layer type
    long_names = ("longrope", "su", "yarn") if keys.model_type == "phi3" else ("longrope", "su")
    for rope in ropes:
        if rope.get("rope_type", rope.get("type")) not in long_names:
            continue
        original = rope.get("original_max_position_embeddings") or keys.get("original_max_position_embeddings")
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            raise UnsupportedModelError(
                "config.json has longrope without 'original_max_position_embeddings', so it is unknown up to which "
                "length sequences can be batched"
            )
        most = min(most, original)
    return most


def _all_dense(keys: ConfigKeys, num_layers: int) -> list[str]:
    return ["dense"] * num_layers


def _all_moe(keys: ConfigKeys, num_layers: int) -> list[str]:
    return ["moe"] * num_layers


def _first_k_dense(keys: ConfigKeys, num_layers: int) -> list[str]:
    if keys.get("moe_layer_freq") not in (None, 1):
        raise UnsupportedModelError(f"moe_layer_freq {keys.get('moe_layer_freq')!r} is not supported, only 1")
    dense = keys.count("first_k_dense_replace", least=0)
    return ["dense" if layer < dense else "moe" for layer in range(num_layers)]


def _sparse_step(keys: ConfigKeys, num_layers: int) -> list[str]:
    step, dense = keys.count("decoder_sparse_step"), keys.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"config.json: 'mlp_only_layers' is {dense!r}, but must be a list of layer numbers")
    return ["dense" if layer in dense or (layer + 1) % step else "moe" for layer in range(num_layers)]


_LAYER_RULES: dict[str, Callable[[ConfigKeys, int], list[str]]] = {
    "dense": _all_dense,
    "moe": _all_moe,
    "first_k_dense": _first_k_dense,
    "sparse_step": _sparse_step,
}


def _mlp_dims(keys: ConfigKeys, rule: str, layer_kinds: tuple[str, ...]) -> dict[str, int]:
    dims: dict[str, int] = {}
    if "dense" in layer_kinds:
        dims["inter"] = keys.count("intermediate_size")
        dims["2*inter"] = 2 * dims["inter"]
    if "moe" in layer_kinds:
        dims["moe_inter"] = keys.count("intermediate_size" if rule == "moe" else "moe_intermediate_size")
        dims["2*moe_inter"] = 2 * dims["moe_inter"]
        dims["num_experts"] = keys.experts()
        dims["experts_per_token"] = keys.count("num_experts_per_tok")
        if rule == "first_k_dense":
            dims["shared_inter"] = keys.count("n_shared_experts") * dims["moe_inter"]
    return dims
