"""Parameters from safetensors, by transformers' own weight conversion (expert packing, renamed keys)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dist_infer.model.adapter import DTYPES, name_of
from dist_infer.model.checkpoint_files import CheckpointFiles
from dist_infer.model.shards import Stored, Wanted, kept_as, shard_tensor
from partition.checkpoint_index import CheckpointIndex, TensorEntry
from partition.errors import CheckpointError
from partition.model_spec import ModelSpec
from partition.sharding import AxisCut, ParameterSpec

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsReader:
    """Implements `ParameterReader`. Through the library's conversion goes just what a parameter needs."""

    def __init__(self, index: CheckpointIndex, spec: ModelSpec, model: Any, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._index, self._spec, self._model, self._dtype = index, spec, model, dtype
        self._files = CheckpointFiles(index)
        self._mapping = get_model_conversion_mapping(model)
        renamings = [w for w in self._mapping if isinstance(w, WeightRenaming)]
        converters = [w for w in self._mapping if isinstance(w, WeightConverter)]
        meta = model.state_dict()
        self._sources: dict[str, list[str]] = {}
        for key in index.tensors:
            target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
            targets = [target]
            if pattern is not None:  # one stored tensor may become several parameters
                converter = next(c for c in converters if pattern in c.source_patterns)
                stem = target.removesuffix(converter.target_patterns[0])
                targets = [stem + t for t in converter.target_patterns] if stem != target else [target]
            for name in targets:
                self._sources.setdefault(name, []).append(key)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        embedding = names[id(model.get_input_embeddings().weight)]
        self._head = names[id(model.get_output_embeddings().weight)]
        self._tied = {self._head: embedding} if self._head not in self._sources else {}

    def require(self, names: set[str]) -> None:
        missing = sorted(n for n in names if self._tied.get(n, n) not in self._sources)
        if self._tied and not self._spec.tied:
            missing.append(self._head)
        if missing:
            raise CheckpointError(
                f"{self._index.path} lacks tensor {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + f", which {self._spec.model_type} with this config.json has"
            )

    def parts(self, parameter: ParameterSpec, cut: AxisCut, wanted: Sequence[Wanted]) -> list[Stored]:
        whole = self._converted(parameter.name, DTYPES[parameter.dtype_in(name_of(self._dtype))])
        if tuple(whole.shape) != parameter.shape:
            raise CheckpointError(
                f"{self._index.path}: tensor {parameter.name} has shape {list(whole.shape)}, "
                f"but config.json says {list(parameter.shape)}"
            )
        where = f"tensor {parameter.name} of {self._index.path} ({self._files_of(parameter.name)})"
        return [
            kept_as(shard_tensor(whole, parameter, cut, part.tp_rank), part.encoding, self._dtype, where=where)
            for part in wanted
        ]

    def _files_of(self, name: str) -> str:
        keys = self._sources[self._tied.get(name, name)]
        return ", ".join(sorted({self._index.tensors[key].file for key in keys}))

    def _converted(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        target = self._tied.get(name, name)
        stored = {key: self._stored(self._index.tensors[key]) for key in sorted(self._sources[target])}
        keys = list(stored)[:3]
        # Kept more exact than the rest: not by way of the model's dtype.
        exact = {f"^{re.escape(target)}$": dtype} if dtype != self._dtype else {}
        # The library puts the result into the model; it is taken out again, and the meta parameter put back.
        place, leaf, meta = _place(self._model, target)
        with _no_progress_bar():
            wanted = LoadStateDictConfig(weight_mapping=self._mapping, dtype=self._dtype, dtype_plan=exact)
            info, _ = convert_and_load_state_dict_in_model(self._model, stored, wanted, None)
        if info.conversion_errors or info.mismatched_keys:
            problem = next(iter(info.conversion_errors.items()), None) or next(iter(info.mismatched_keys))
            raise CheckpointError(f"{self._index.path}: tensor does not fit the model: {problem}")
        tensor = place[leaf]
        if tensor is None or tensor.is_meta:
            raise CheckpointError(f"{self._index.path}: tensor {target} could not be made from {keys}")
        place[leaf] = meta
        result: torch.Tensor = tensor.detach().to(dtype)
        return result

    def _stored(self, entry: TensorEntry) -> torch.Tensor:
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self._index.path}: tensor {entry.name} is stored as {entry.dtype}; float checkpoints "
                f"({', '.join(_FLOATS)}) are read, quantized safetensors are not"
            )
        return torch.frombuffer(self._files.bytes_of(entry), dtype=_FLOATS[entry.dtype]).reshape(entry.shape)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The library would draw one for every parameter, across the packer's own."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _place(model: Any, name: str) -> tuple[dict[str, Any], str, Any]:
    """Where a module keeps a parameter or stored buffer, under which name, and what is there."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    place = module._parameters if leaf in module._parameters else module._buffers
    return place, leaf, place[leaf]
