"""Does the checkpoint hold what its config says? Asked before anything is packed or started."""

from __future__ import annotations

import re
from collections.abc import Iterator

from partition.checkpoint_index import CheckpointIndex, TensorEntry
from partition.errors import CheckpointError, UnsupportedModelError
from partition.gguf_names import gguf_sources
from partition.model_spec import ModelSpec, text_config
from partition.sharding import ParameterSpec, units_of

Expected = tuple[str, tuple[int, ...]]

_FLOATS = {"F64", "F32", "F16", "BF16"}
_EXPERTS = re.compile(r"^(model\.layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)$")
_ROUTER = re.compile(r"^(model\.layers\.\d+\.)mlp\.gate\.weight$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\..*\.(weight|bias)$")
_BLOCK = re.compile(r"^blk\.(\d+)\.")


def check_tensors(spec: ModelSpec, index: CheckpointIndex) -> None:
    """Every parameter that `spec` expects is there with its shape; a tied lm_head may be absent.

    Raises CheckpointError naming the tensor with expected and actual shape, UnsupportedModelError for quantized
    safetensors. A config-only checkpoint has no tensors to check and is refused.
    """
    if index.kind == "config_only":
        raise CheckpointError(f"{index.path} has a config.json but no weights: it can be planned, not launched")
    if index.kind == "gguf":
        _check_gguf(spec, index)
        return
    quantization = text_config(index.config).get("quantization_config", index.config.get("quantization_config"))
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{index.path} is quantized ({str(method)[:50]}): use the checkpoint in bfloat16, float16 or float32"
        )
    if spec.table is not None:
        return  # names and shapes of such a type are known to its model class: they are checked when it is packed
    tensors = _plain_names(index)
    known: set[str] = set()
    for unit in units_of(spec):
        for parameter in unit.parameters:
            layouts = list(_layouts(spec, parameter))
            chosen = next((layout for layout in layouts if layout[0][0] in tensors), layouts[0])
            known.update(name for name, _ in chosen)
            if parameter.name == "lm_head.weight" and spec.tied and parameter.name not in tensors:
                continue
            for name, shape in chosen:
                _compare(index, name, shape, tensors.get(name))
                if tensors[name].dtype not in _FLOATS:
                    raise UnsupportedModelError(f"{index.path}: tensor {name!r} is {tensors[name].dtype}, not a float")
    for name in tensors:
        layer = _LAYER.match(name)
        if layer and int(layer[1]) < spec.num_layers and name not in known and "rotary_emb" not in name:
            raise CheckpointError(
                f"{index.path}: tensor {name!r} belongs to no parameter of a {spec.model_type} model with this "
                f"config.json (flags {spec.flags}), so the model would be computed without it"
            )


def _plain_names(index: CheckpointIndex) -> dict[str, TensorEntry]:
    """The text model's tensors, named as in a text-only checkpoint."""
    if "model.embed_tokens.weight" in index.tensors:
        return index.tensors
    for prefix, plain in (("language_model.model.", "model."), ("model.language_model.", "model.")):
        if f"{prefix}embed_tokens.weight" in index.tensors:
            renamed = {
                plain + name.removeprefix(prefix): entry
                for name, entry in index.tensors.items()
                if name.startswith(prefix)
            }
            for head in ("lm_head.weight", "language_model.lm_head.weight"):
                if head in index.tensors:
                    renamed["lm_head.weight"] = index.tensors[head]
            return renamed
    return index.tensors


def _layouts(spec: ModelSpec, parameter: ParameterSpec) -> Iterator[list[Expected]]:
    """The ways to store a parameter: under its own name, or expert by expert as checkpoints on disk have it."""
    yield [(parameter.name, parameter.shape)]
    if found := _EXPERTS.match(parameter.name):
        num_experts, inter, hidden = spec.dims["num_experts"], spec.dims["moe_inter"], spec.dims["hidden"]
        for folder, into, out in (
            ("mlp", ("gate_proj", "up_proj"), ("down_proj",)),
            ("block_sparse_moe", ("w1", "w3"), ("w2",)),
        ):
            leaves, shape = (into, (inter, hidden)) if found[2] == "gate_up_proj" else (out, (hidden, inter))
            yield [
                (f"{found[1]}{folder}.experts.{expert}.{leaf}.weight", shape)
                for expert in range(num_experts)
                for leaf in leaves
            ]
    if found := _ROUTER.match(parameter.name):
        yield [(f"{found[1]}block_sparse_moe.gate.weight", parameter.shape)]


def _check_gguf(spec: ModelSpec, index: CheckpointIndex) -> None:
    sources = gguf_sources(spec, index.tensors)
    for unit in units_of(spec):
        for parameter in unit.parameters:
            names, shape = sources[parameter.name], parameter.shape
            if parameter.name == "lm_head.weight" and not spec.tied:
                names = ("output.weight",)
            if len(names) > 1:  # tensors whose rows lie one behind the other in the parameter
                shape = (*shape[:-2], shape[-2] // len(names), shape[-1])
            for name in names:
                _compare(index, name, shape, index.tensors.get(name))
    blocks = {int(found[1]) for name in index.tensors if (found := _BLOCK.match(name))}
    if blocks != set(range(spec.num_layers)):
        raise CheckpointError(f"{index.path} has {len(blocks)} blocks, its metadata says {spec.num_layers}")
    known = {name for names in sources.values() for name in names}
    for name in index.tensors:
        if _BLOCK.match(name) and name not in known:
            raise CheckpointError(
                f"{index.path}: tensor {name!r} belongs to no parameter of a {spec.model_type} model, so the model "
                f"would be computed without it"
            )


def _compare(index: CheckpointIndex, name: str, shape: tuple[int, ...], entry: TensorEntry | None) -> None:
    if entry is None:
        raise CheckpointError(f"{index.path} lacks tensor {name!r} of shape {list(shape)}, which its config calls for")
    if entry.shape != shape:
        raise CheckpointError(
            f"{index.path}: tensor {name!r} in {entry.file} has shape {list(entry.shape)}, its config calls for "
            f"{list(shape)}"
        )
