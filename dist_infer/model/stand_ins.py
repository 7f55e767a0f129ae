"""What stands in the place of a model class's own modules: layers, embeddings and norms of a stage and tensor rank."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


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


def give_heads(attention_module: Any, num_heads: int, num_kv_heads: int) -> None:
    """A config of its own with this rank's heads, for attention that splits a joint projection by it."""
    attention_module.config = copy.copy(attention_module.config)
    attention_module.config.num_attention_heads = num_heads
    attention_module.config.num_key_value_heads = attention_module.num_key_value_heads = num_kv_heads


class WholeNorm:
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


class EndOfStage(Exception):
    """Leaves the model's forward once the last owned layer's arguments are known."""


class Tape:
    """What the stubs do at the moment: record arguments (begin), or hand hidden states through (finish)."""

    def __init__(self, first: int, end: int, num_outputs: int | None) -> None:
        self.first, self.end = first, end
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.entry: torch.Tensor | None = None
        self.hidden: torch.Tensor | None = None  # stands for the embedding's output where that is not computed
        self.passing_through = False
        # what a layer of this class returns: 0 for the hidden states alone, else the length of its tuple
        self.possible_outputs = (0, 2, 3) if num_outputs is None else (num_outputs,)
        self._num_outputs = self.possible_outputs[0]

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


class LayerStub(nn.Module):
    """In the place of a decoder layer; keeps the attributes that model code asks of a layer."""

    def __init__(self, original: nn.Module, index: int, tape: Tape) -> None:
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
            raise EndOfStage
        return tape.output(hidden)


class FirstStageOnly(nn.Module):
    """Position embeddings, a norm or projection of embeddings: done once, where the embedding is."""

    def __init__(self, original: nn.Module, tape: Tape) -> None:
        super().__init__()
        self.original, self._tape = original, tape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._tape.hidden is not None:
            return self._tape.hidden
        return self.original(*args, **kwargs)


class StageEmbedding(nn.Module):
    """The model's own embedding over this rank's vocabulary rows: foreign rows give zero, then all-reduce (exact)."""

    def __init__(self, original: nn.Module, rows: tuple[int, int], group: TensorParallel, tape: Tape) -> None:
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
