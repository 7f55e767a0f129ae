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

import copy
import inspect
import re
import threading
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
from dist_infer.model.latent_attention import keep_latent
from dist_infer.model.sequence_cache import SequenceCache
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
        self._tape = _Tape(first_layer, end_layer, spec.family.get("layer_outputs", 0))
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
        for num_outputs in self._tape.possible_outputs:
            try:
                with self._tape.recording(hidden, num_outputs), suppress(_EndOfStage):
                    self._model(input_ids=token_ids, **own)
                break
            except (IndexError, ValueError):  # its layers return something else, if that is not known yet
                if num_outputs == self._tape.possible_outputs[-1]:
                    raise
        entry = self._tape.entry if hidden is None else hidden
        if entry is None:
            raise RuntimeError("the model's forward never reached the first layer of this stage")
        return LayerCalls(token_ids, position_ids, entry, self._tape.calls)

    def layer(self, index: int, calls: LayerCalls) -> None:
        """One owned layer: replaces `calls.hidden` by its output."""
        positional, keywords = calls.arguments[index]
        output = self._layers[index](calls.hidden, *positional, **keywords)
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
                        _give_heads(module, *heads)
                        continue
                    if collective.kind.startswith("norm_"):
                        axis = cut.intervals[collective.kind.removeprefix("norm_")]
                        module.forward = _WholeNorm(module, self._group, axis, tp_rank)
                        continue
                    module.register_forward_hook(lambda _m, _a, output: self._group.all_reduce(output))

    def _replace_outer(self, spec: ModelSpec) -> None:
        """What else comes before the layers has weights on the first stage alone: elsewhere it hands through."""
        embedding = self._model.get_input_embeddings()
        for owner in {parameter.name.rpartition(".")[0] for parameter in units_of(spec)[0].parameters}:
            module = self._model.get_submodule(owner)
            if module is not embedding:
                parent, _, attribute = owner.rpartition(".")
                setattr(self._model.get_submodule(parent), attribute, _FirstStageOnly(module, self._tape))

    def _replace_embedding(self, spec: ModelSpec, tp_rank: int) -> None:
        embedding = self._model.get_input_embeddings()
        name = next(name for name, module in self._model.named_modules() if module is embedding)
        parent, _, attribute = name.rpartition(".")
        embedding.padding_idx = None  # only matters for gradients, and must lie inside the local rows otherwise
        rows = cut_axes(spec, self._group.size).intervals["vocab"][tp_rank]
        setattr(self._model.get_submodule(parent), attribute, _Embedding(embedding, rows, self._group, self._tape))


def _give_heads(attention_module: Any, num_heads: int, num_kv_heads: int) -> None:
    """A config of its own with this rank's heads, for attention that splits a joint projection by it."""
    attention_module.config = copy.copy(attention_module.config)
    attention_module.config.num_attention_heads = num_heads
    attention_module.config.num_key_value_heads = attention_module.num_key_value_heads = num_kv_heads


class _WholeNorm:
    """In the place of an RMS norm's forward whose width is all heads: this rank has its own, and the squares of all.

    Ranks that share a KV head all have its squares: each gives its part.
    """

    def __init__(self, module: Any, group: TensorParallel, axis: tuple[tuple[int, int], ...], tp_rank: int) -> None:
        self._module, self._group = module, group
        first, end = axis[tp_rank]
        self._part = 1 / axis.count(axis[tp_rank])
        self._scale = (end - first) / max(last for _, last in axis)  # of the whole width that is here

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        squares = self._group.all_reduce(x.pow(2).sum(-1, keepdim=True) * self._part)
        variance = squares * (self._scale / x.shape[-1])
        normed: torch.Tensor = self._module.weight * (x * torch.rsqrt(variance + self._module.variance_epsilon))
        return normed.to(hidden_states.dtype)


class _EndOfStage(Exception):
    """Leaves the model's forward once the last owned layer's arguments are known."""


class _Tape:
    """What the stubs do at the moment: record arguments (begin), or hand hidden states through (finish)."""

    def __init__(self, first: int, end: int, num_outputs: int) -> None:
        self.first, self.end = first, end
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.entry: torch.Tensor | None = None
        self.hidden: torch.Tensor | None = None  # stands for the embedding's output where that is not computed
        self.passing_through = False
        # what a layer of this class returns: 0 for the hidden states alone, else the length of its tuple
        self.possible_outputs = (num_outputs,) if num_outputs else (0, 2, 3)
        self._num_outputs = num_outputs

    def output(self, hidden: Any) -> Any:
        """In the form in which the layers of this class return it."""
        return (hidden, *[None] * (self._num_outputs - 1)) if self._num_outputs else hidden

    @contextmanager
    def recording(self, hidden: torch.Tensor | None, num_outputs: int) -> Iterator[None]:
        self._num_outputs = num_outputs
        self.calls, self.entry, self.hidden, self.passing_through = {}, None, hidden, False
        yield

    @contextmanager
    def passing(self, hidden: torch.Tensor) -> Iterator[None]:
        self._num_outputs = self.possible_outputs[0]
        self.hidden, self.passing_through = hidden, True
        yield
        self.hidden = None


class _Stub(nn.Module):
    """In the place of a decoder layer; keeps the attributes that model code asks of a layer."""

    def __init__(self, original: nn.Module, index: int, tape: _Tape) -> None:
        super().__init__()
        self._index, self._tape = index, tape
        self.__dict__["_original"] = original  # not as a submodule: its layers are the stage's

    def __getattr__(self, name: str) -> Any:
        """What model code asks of a layer (attention_type, layer_idx, block_type, …) is asked of the layer."""
        return getattr(self.__dict__["_original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tape = self._tape
        if tape.passing_through:
            return tape.output(tape.hidden)
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
        return tape.output(hidden)


class _FirstStageOnly(nn.Module):
    """Position embeddings, a norm or projection of embeddings: done once, where the embedding is."""

    def __init__(self, original: nn.Module, tape: _Tape) -> None:
        super().__init__()
        self.original, self._tape = original, tape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._tape.hidden is not None:
            return self._tape.hidden
        return self.original(*args, **kwargs)


class _Embedding(nn.Module):
    """The model's own embedding over this rank's vocabulary rows: foreign rows give zero, then all-reduce (exact)."""

    def __init__(self, original: nn.Module, rows: tuple[int, int], group: TensorParallel, tape: _Tape) -> None:
        super().__init__()
        self.original = original
        self._rows, self._group, self._tape = rows, group, tape

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # model code asks an embedding for its weight's device
            return getattr(super().__getattr__("original"), name)

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
