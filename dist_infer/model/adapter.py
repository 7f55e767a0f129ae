"""The one place that knows transformers' internals: a stage of a causal LM whose weights are bound from outside.

The model class is built on the meta device and its decoder layers are taken out of it. Stubs stay in their place, so
the class's own `forward` still computes everything around the layers (embedding, scaling, rotary tables, per-layer
arguments, final norm, head, logit softcap). A step then is

    begin    forward with recording stubs: embedding -> hidden states, and the arguments every layer would get
    layer    one owned layer with its recorded arguments, called by the stage runner's visible loop
    finish   forward with stubs that hand the last hidden states through: final norm -> head -> logits

so that no hook hides the streaming loop. Private names used: `_init_weights`, `_is_hf_initialized`, `_parameters`,
`_buffers`, `_get_dtype_plan`; transformers is pinned to the minors they were tried with.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dist_infer.model import attention
from dist_infer.model.latent_attention import keep_latent
from dist_infer.model.sequence_cache import SequenceCache
from dist_infer.model.stand_ins import (
    EndOfStage,
    FirstStageOnly,
    LayerStub,
    StageEmbedding,
    Tape,
    TensorParallel,
    WholeNorm,
    give_heads,
)
from offload.views import UnitWeights
from partition.errors import UnsupportedModelError
from partition.model_spec import ModelSpec
from partition.sharding import collectives_of, cut_axes, local_heads, units_of

_building = threading.Lock()  # the library sets the process' default dtype meanwhile, and back to what it found
AttentionInterface.register(attention.NAME, attention.paged_attention)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """The key of DTYPES, and torch's own name."""
    return str(dtype).removeprefix("torch.")


@dataclass
class LayerCalls:
    """What `begin` found for one micro-batch: hidden states [1, T, H] and each owned layer's other arguments."""

    token_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T]
    hidden: torch.Tensor
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]


def transformers_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The library's config object of a parsed config.json (the text part of a composite one), untied."""
    text = config.get("text_config", config)
    model_type = text.get("model_type", config.get("model_type"))
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"model_type {model_type!r}: the installed transformers has no causal LM of that name"
        )
    try:
        result = CONFIG_MAPPING[model_type].from_dict({**_plain(text), "tie_word_embeddings": False})
    except Exception as error:  # the library's strict dataclasses raise many kinds
        raise UnsupportedModelError(
            f"config.json of {model_type!r} is refused by transformers: {_flat(error)}"
        ) from error
    return result


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    """JSON has no infinity: the library writes such numbers as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def meta_model(config: Mapping[str, Any], dtype: torch.dtype, *, path: str = "packed", experts: str = "eager") -> Any:
    """The whole causal LM without a byte of weights (0.1 s for 671B parameters).

    path "fallback": with an attention of the library's own. experts: "eager" touches the routed experts only, one at a
    time; "batched_mm" depends on no data and so runs on meta tensors.
    """
    wished = (attention.NAME, "sdpa", "eager") if path == "packed" else ("sdpa", "eager")
    for implementation in wished:
        try:
            with _building, torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    transformers_config(config),
                    dtype=dtype,
                    attn_implementation=implementation,
                    experts_implementation=experts,
                )
        except (KeyError, ValueError) as error:  # a class without an interface for it
            failure = error
            continue
        with suppress(Exception):  # configs that insist on a number; with one, forward looks for padding in every step
            model.config.pad_token_id = None
        return model.eval().requires_grad_(False)
    raise UnsupportedModelError(
        f"transformers cannot build {config.get('model_type')!r}: {_flat(failure)}"
    ) from failure


def check_parameters(spec: ModelSpec, model: Any) -> None:
    """Refuse unless our parameter table is exactly what the model class has: names and shapes."""
    ours = {p.name: p.shape for unit in units_of(spec) for p in unit.parameters}
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = sorted(ours.keys() | theirs.keys())
    differing = [name for name in names if ours.get(name) != theirs.get(name)]
    wrong = [f"{name}: table {ours.get(name)}, model {theirs.get(name)}" for name in differing]
    if wrong:
        raise UnsupportedModelError(
            f"{spec.model_type} with this config has parameters the partition table does not describe, so it would not "
            f"be cut correctly: {'; '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}"
        )


def kept_dtypes(model: Any) -> dict[str, dict[str, str]]:
    """What the library keeps in float32 when it loads a half-precision model: parameter -> fields of its table row.

    `model` has to be built in bfloat16: a parameter that the class makes in float32 itself shows by its dtype.
    """
    found: dict[str, dict[str, str]] = {}
    plans = {
        key: [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
        for key, dtype in (("dtype", torch.bfloat16), ("half_dtype", torch.float16))
    }
    for name, tensor in model.state_dict().items():
        own = [key for key, patterns in plans.items() if any(pattern.search(name) for pattern in patterns)]
        if tensor.dtype == torch.float32 or "dtype" in own:
            found[name] = {"dtype": "float32"}
        elif own:
            found[name] = {"half_dtype": "float32"}
    return found


class StageModel:
    """Layers [first, end) of a model on one rank. The caller binds a unit's weights before it is computed.

    Owned by the stage runner; not thread-safe. Buffers (rotary tables) live on `device`; weights are whatever views
    `bind` was given.
    """

    def __init__(
        self,
        *,
        spec: ModelSpec,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        first_layer: int,
        end_layer: int,
        tp_rank: int,
        group: TensorParallel,
    ) -> None:
        self.first_layer, self.end_layer, self.num_layers = first_layer, end_layer, spec.num_layers
        model = meta_model(config, dtype, path=spec.path)
        check_parameters(spec, model)
        self._model = model
        self._vocab_size = spec.vocab_size
        arguments = inspect.signature(type(model).forward).parameters
        self._cache_argument = "cache_params" if "cache_params" in arguments else "past_key_values"
        self._takes_positions = "position_ids" in arguments
        self._group = group
        self._tape = Tape(first_layer, end_layer, spec.family.get("layer_outputs", 0))
        self._places = _parameter_places(spec, model)
        self._bound: dict[str, UnitWeights] = {}
        _restore_buffers(model, device)
        layers = _find_layers(model, spec.num_layers)
        self._replace_outer(spec)
        self._layers = {i: layers[i] for i in range(first_layer, end_layer)}
        if spec.latent_dim:
            for layer in self._layers.values():
                keep_latent(layer)
        if group.size > 1:
            self._install_collectives(spec, tp_rank)
        self._replace_embedding(spec, tp_rank)
        for index in range(spec.num_layers):
            layers[index] = LayerStub(layers[index], index, self._tape)

    @property
    def is_first(self) -> bool:
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        return self.end_layer == self.num_layers

    def bind(self, unit: str, tensors: UnitWeights) -> None:
        """Point the unit's parameters at these tensors. Binding the same mapping again costs nothing.

        An encoded tensor stands where the parameter does: torch hands the calls that meet one over to it.
        """
        if self._bound.get(unit) is tensors:
            return
        for place, leaf, name in self._places[unit]:
            place[leaf] = tensors[name]
        self._bound[unit] = tensors

    @property
    def config(self) -> Any:
        """The library's config object: what its caches are made from."""
        return self._model.config

    def begin(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        hidden: torch.Tensor | None,
        cache: SequenceCache | None = None,
    ) -> LayerCalls:
        """Everything before the first owned layer. token_ids, position_ids: [1, T]; hidden [1, T, H] unless first.

        cache: of the one sequence in the row, on the fallback path; the layers get it with their arguments.
        """
        own: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            cache.num_computed = int(position_ids[0, 0])
            own = {"use_cache": True, self._cache_argument: cache}
        if self._takes_positions:
            own["position_ids"] = position_ids
        first_error: Exception | None = None
        for num_outputs in self._tape.possible_outputs:
            try:
                with self._tape.recording(hidden, num_outputs), suppress(EndOfStage):
                    self._model(input_ids=token_ids, **own)
                break
            except (IndexError, ValueError) as error:  # its layers return something else, if that is not known yet
                first_error = first_error or error
        else:
            raise first_error or RuntimeError("nothing is possible")
        entry = self._tape.entry if hidden is None else hidden
        if entry is None:
            raise RuntimeError("the model's forward never reached the first layer of this stage")
        return LayerCalls(token_ids, position_ids, entry, self._tape.calls)

    def layer(self, index: int, calls: LayerCalls) -> None:
        """One owned layer: replaces `calls.hidden` by its output."""
        positional, keywords = calls.arguments[index]
        output = self._layers[index](calls.hidden, *positional, **keywords)
        if len(self._tape.possible_outputs) > 1:
            self._tape.possible_outputs = (len(output) if isinstance(output, tuple) else 0,)
        calls.hidden = output[0] if isinstance(output, tuple) else output

    def finish(self, calls: LayerCalls, rows: torch.Tensor) -> torch.Tensor:
        """Final norm and head on the given rows of the packed row: logits [len(rows), vocab] (whole on tp_rank 0)."""
        if rows.numel() == 0:  # nobody wants a token of these
            return calls.hidden.new_empty(0, self._vocab_size)
        own = {"position_ids": calls.position_ids[:, rows]} if self._takes_positions else {}
        with self._tape.passing(calls.hidden[:, rows]):
            output = self._model(input_ids=calls.token_ids[:, rows], use_cache=False, **own)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _install_collectives(self, spec: ModelSpec, tp_rank: int) -> None:
        cut = cut_axes(spec, self._group.size)
        heads = local_heads(spec, cut, tp_rank)
        widths = tuple(end - first for first, end in cut.intervals["vocab"])
        for collective in collectives_of(spec):
            if collective.kind == "mask_all_reduce":
                continue  # the embedding: see _replace_embedding
            if collective.kind == "gather_vocab":
                module = self._model.get_submodule(collective.module)
                module.register_forward_hook(lambda _m, _a, output: self._group.gather_columns(output, widths))
                continue
            for index in self._layers:
                if spec.layer_kinds[index] in collective.layer_kinds:
                    module = self._model.get_submodule(collective.module.replace("{i}", str(index)))
                    if collective.kind == "local_heads":
                        give_heads(module, *heads)
                        continue
                    if collective.kind.startswith("norm_"):
                        axis = cut.intervals[collective.kind.removeprefix("norm_")]
                        module.forward = WholeNorm(module, self._group, axis, tp_rank)
                        continue
                    module.register_forward_hook(lambda _m, _a, output: self._group.all_reduce(output))

    def _replace_outer(self, spec: ModelSpec) -> None:
        """What else comes before the layers has weights on the first stage alone: elsewhere it hands through."""
        embedding = self._model.get_input_embeddings()
        for owner in {parameter.name.rpartition(".")[0] for parameter in units_of(spec)[0].parameters}:
            module = self._model.get_submodule(owner)
            if module is not embedding:
                parent, _, attribute = owner.rpartition(".")
                setattr(self._model.get_submodule(parent), attribute, FirstStageOnly(module, self._tape))

    def _replace_embedding(self, spec: ModelSpec, tp_rank: int) -> None:
        embedding = self._model.get_input_embeddings()
        name = next(name for name, module in self._model.named_modules() if module is embedding)
        parent, _, attribute = name.rpartition(".")
        embedding.padding_idx = None  # only matters for gradients, and must lie inside the local rows otherwise
        rows = cut_axes(spec, self._group.size).intervals["vocab"][tp_rank]
        setattr(self._model.get_submodule(parent), attribute, StageEmbedding(embedding, rows, self._group, self._tape))


def layers_name(model: Any, num_layers: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.endswith(("layers", "h", "blocks")):
            return str(name)
    raise UnsupportedModelError(f"{model.config.model_type}: no list of {num_layers} decoder layers in the model class")


def _find_layers(model: Any, num_layers: int) -> nn.ModuleList:
    layers = model.get_submodule(layers_name(model, num_layers))
    if not isinstance(layers, nn.ModuleList):
        raise RuntimeError("decoder layers are no ModuleList")
    return layers


def _parameter_places(spec: ModelSpec, model: Any) -> dict[str, list[tuple[dict[str, Any], str, str]]]:
    """unit -> (where the module looks the tensor up, under which name, full name).

    Resolved before layers are replaced by stubs. A stored buffer (DeepSeek's router bias) is bound like a parameter.
    """
    places: dict[str, list[tuple[dict[str, Any], str, str]]] = {}
    for unit in units_of(spec):
        found = []
        for parameter in unit.parameters:
            owner, _, leaf = parameter.name.rpartition(".")
            module = model.get_submodule(owner)
            found.append((module._parameters if leaf in module._parameters else module._buffers, leaf, parameter.name))
        places[unit.name] = found
    return places


def _restore_buffers(model: Any, device: torch.device) -> None:
    """Non-persistent buffers (rotary tables, embedding scales) are computed by the library's own init.

    The flag on the parameters of the same module keeps that init from drawing weights at random.
    """
    for module in model.modules():
        if not any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter._is_hf_initialized = True
        with torch.no_grad(), torch.device(device):
            model._init_weights(module)
