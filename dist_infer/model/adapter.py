"""The one place that knows transformers' internals: a stage of a causal LM whose weights are bound from outside.

The model class is built on the meta device and its decoder layers are taken out of it. Stubs stay in their place, so
the class's own `forward` still computes everything around the layers (embedding, scaling, rotary tables, per-layer
arguments, final norm, head, logit softcap). A step then is

    begin    forward with recording stubs: embedding -> hidden states, and the arguments every layer would get
    layer    one owned layer with its recorded arguments, called by the stage runner's visible loop
    finish   forward with stubs that hand the last hidden states through: final norm -> head -> logits

so that no hook hides the streaming loop. Private names used: `_init_weights`, `_is_hf_initialized`, `_parameters`,
`_buffers`; transformers is pinned to the minors they were tried with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dist_infer.model import attention
from offload.views import UnitWeights
from partition.errors import UnsupportedModelError
from partition.model_spec import ModelSpec
from partition.sharding import collectives_of, cut_axes, units_of

AttentionInterface.register(attention.NAME, attention.paged_attention)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STUB_ATTRIBUTES = ("attention_type", "layer_type", "layer_idx", "is_sliding", "block_type", "self_attn_layer_type")


class TensorParallel(Protocol):
    """What a stage asks of its tensor-parallel group; implemented by the worker."""

    @property
    def size(self) -> int: ...

    @property
    def seconds(self) -> float:
        """Spent in collectives so far."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place where possible."""
        ...

    def gather_columns(self, tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        """[..., own width] -> [..., sum(widths)] on tp_rank 0; elsewhere the input comes back."""
        ...


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
        result = CONFIG_MAPPING[model_type].from_dict({**text, "tie_word_embeddings": False})
    except Exception as error:  # the library's strict dataclasses raise many kinds
        raise UnsupportedModelError(f"config.json of {model_type!r} is refused by transformers: {error}") from error
    return result


def meta_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The whole causal LM without a byte of weights (0.1 s for 671B parameters)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            transformers_config(config),
            dtype=dtype,
            attn_implementation=attention.NAME,
            experts_implementation="eager",  # touches the routed experts only, one at a time
        )
    return model.eval().requires_grad_(False)


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
        model = meta_model(config, dtype)
        check_parameters(spec, model)
        self._model = model
        self._group = group
        self._tape = _Tape(first_layer, end_layer)
        self._places = _parameter_places(spec, model)
        self._bound: dict[str, UnitWeights] = {}
        _restore_buffers(model, device)
        layers = _find_layers(model, spec.num_layers)
        self._layers = {i: layers[i] for i in range(first_layer, end_layer)}
        if group.size > 1:
            self._install_collectives(spec, tp_rank)
        self._replace_embedding(spec, tp_rank)
        for index in range(spec.num_layers):
            layers[index] = _Stub(layers[index], index, self._tape)

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

    def begin(self, token_ids: torch.Tensor, position_ids: torch.Tensor, hidden: torch.Tensor | None) -> LayerCalls:
        """Everything before the first owned layer. token_ids, position_ids: [1, T]; hidden [1, T, H] unless first."""
        with self._tape.recording(hidden), suppress(_EndOfStage):
            self._model(input_ids=token_ids, position_ids=position_ids, use_cache=False)
        entry = self._tape.entry if hidden is None else hidden
        if entry is None:
            raise RuntimeError("the model's forward never reached the first layer of this stage")
        return LayerCalls(token_ids, position_ids, entry, self._tape.calls)

    def layer(self, index: int, calls: LayerCalls) -> None:
        """One owned layer: replaces `calls.hidden` by its output."""
        positional, keywords = calls.arguments[index]
        output = self._layers[index](calls.hidden, *positional, **keywords)
        calls.hidden = output[0] if isinstance(output, tuple) else output

    def finish(self, calls: LayerCalls, rows: torch.Tensor) -> torch.Tensor:
        """Final norm and head on the given rows of the packed row: logits [len(rows), vocab] (whole on tp_rank 0)."""
        with self._tape.passing(calls.hidden):
            output = self._model(
                input_ids=calls.token_ids, position_ids=calls.position_ids, use_cache=False, logits_to_keep=rows
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _install_collectives(self, spec: ModelSpec, tp_rank: int) -> None:
        cut = cut_axes(spec, self._group.size)
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
                    module.register_forward_hook(lambda _m, _a, output: self._group.all_reduce(output))

    def _replace_embedding(self, spec: ModelSpec, tp_rank: int) -> None:
        embedding = self._model.get_input_embeddings()
        name = next(name for name, module in self._model.named_modules() if module is embedding)
        parent, _, attribute = name.rpartition(".")
        embedding.padding_idx = None  # only matters for gradients, and must lie inside the local rows otherwise
        rows = cut_axes(spec, self._group.size).intervals["vocab"][tp_rank]
        setattr(self._model.get_submodule(parent), attribute, _Embedding(embedding, rows, self._group, self._tape))


class _EndOfStage(Exception):
    """Leaves the model's forward once the last owned layer's arguments are known."""


class _Tape:
    """What the stubs do at the moment: record arguments (begin), or hand hidden states through (finish)."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.entry: torch.Tensor | None = None
        self.hidden: torch.Tensor | None = None  # stands for the embedding's output where that is not computed
        self.passing_through = False

    @contextmanager
    def recording(self, hidden: torch.Tensor | None) -> Iterator[None]:
        self.calls, self.entry, self.hidden, self.passing_through = {}, None, hidden, False
        yield

    @contextmanager
    def passing(self, hidden: torch.Tensor) -> Iterator[None]:
        self.hidden, self.passing_through = hidden, True
        yield
        self.hidden = None


class _Stub(nn.Module):
    """In the place of a decoder layer; keeps the attributes that model code asks of a layer."""

    def __init__(self, original: nn.Module, index: int, tape: _Tape) -> None:
        super().__init__()
        for name in _STUB_ATTRIBUTES:
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))
        self._index, self._tape = index, tape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tape = self._tape
        if tape.passing_through:
            return tape.hidden
        if args:
            hidden, positional = args[0], args[1:]
        else:
            hidden, positional = kwargs.pop("hidden_states"), ()
        if self._index == tape.first:
            tape.entry = hidden
        if self._index >= tape.first:
            tape.calls[self._index] = (positional, kwargs)
        if self._index == tape.end - 1:
            raise _EndOfStage
        return hidden


class _Embedding(nn.Module):
    """The model's own embedding over this rank's vocabulary rows: foreign rows give zero, then all-reduce (exact)."""

    def __init__(self, original: nn.Module, rows: tuple[int, int], group: TensorParallel, tape: _Tape) -> None:
        super().__init__()
        self.original = original
        self._rows, self._group, self._tape = rows, group, tape

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._tape.hidden is not None:
            return self._tape.hidden
        if self._group.size == 1:
            whole: torch.Tensor = self.original(token_ids)
            return whole
        first, end = self._rows
        foreign = (token_ids < first) | (token_ids >= end)
        output: torch.Tensor = self.original((token_ids - first).masked_fill(foreign, 0))
        return self._group.all_reduce(output.masked_fill(foreign[..., None], 0))


def _layers_name(model: Any, num_layers: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and name.endswith(("layers", "h", "blocks")):
            return str(name)
    raise UnsupportedModelError(f"{model.config.model_type}: no list of {num_layers} decoder layers in the model class")


def _find_layers(model: Any, num_layers: int) -> nn.ModuleList:
    layers = model.get_submodule(_layers_name(model, num_layers))
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
