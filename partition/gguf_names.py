"""Which tensors of a GGUF file make up each parameter. The names are llama.cpp's; tests compare them with `gguf`'s."""

from __future__ import annotations

from collections.abc import Container

from partition.model_spec import ModelSpec
from partition.sharding import ParameterSpec, UnitSpec, units_of

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_MODULES_OF_FOUR_NORMS = {  # gemma: a norm before and one after each half of a layer
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_sources(spec: ModelSpec, there: Container[str]) -> dict[str, tuple[str, ...]]:
    """Parameter -> the tensors it is made of, in order.

    Several tensors lie one behind the other in each expert's rows: the parameter is [experts, rows of all, columns].
    `there`: the file's tensors, for what converters have written in two ways. Raises KeyError for a parameter that no
    GGUF file has a name for.
    """
    return {
        parameter.name: _sources(unit, parameter, index - 1, there)
        for index, unit in enumerate(units_of(spec))
        for parameter in unit.parameters
    }


def _sources(unit: UnitSpec, parameter: ParameterSpec, layer: int, there: Container[str]) -> tuple[str, ...]:
    if not unit.name.startswith("layers."):
        source = _OUTER[parameter.name]
        return (source if source in there or source != "output.weight" else "token_embd.weight",)
    leaf = parameter.name.removeprefix(f"model.layers.{layer}.")
    block = f"blk.{layer}."
    if leaf == "mlp.experts.down_proj":
        return (f"{block}ffn_down_exps.weight",)
    if leaf == "mlp.experts.gate_up_proj":
        joined = f"{block}ffn_gate_up_exps.weight"
        return (joined,) if joined in there else (f"{block}ffn_gate_exps.weight", f"{block}ffn_up_exps.weight")
    module, _, suffix = leaf.rpartition(".")
    four = any(other.name.endswith("pre_feedforward_layernorm.weight") for other in unit.parameters)
    names = _MODULES | _MODULES_OF_FOUR_NORMS if four else _MODULES
    return (f"{block}{names[module]}.{suffix}",)
