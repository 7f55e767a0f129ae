"""Where packed units come from: a checkpoint, converted to the model's parameters and cut for every tensor rank.

Reads one unit at a time by pread (never mmap). safetensors go through transformers' own weight conversion (expert
packing, renamed keys); GGUF tensors through the `gguf` package's dequantisation and transformers' name map and
per-architecture fix-ups. Peak memory: the unit's tensors as stored plus as converted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_infer.model.adapter import DTYPES, check_parameters, meta_model
from partition.checkpoint import CheckpointIndex, TensorEntry
from partition.errors import CheckpointError
from partition.gguf_config import gguf_architecture
from partition.model_spec import ModelSpec
from partition.sharding import AxisCut, ParameterSpec, cut_axes, shard_intervals, units_of

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PLAIN = {"token_embd.weight", "output.weight"}
_PIECE_ELEMENTS = 1 << 20


class CheckpointSource:
    """Implements `offload.pack.WeightSource` for one checkpoint, tensor degree and dtype."""

    def __init__(
        self, *, index: CheckpointIndex, spec: ModelSpec, tensor: int, tp_ranks: Sequence[int], dtype: torch.dtype
    ) -> None:
        self._index, self._tp_ranks = index, tuple(tp_ranks)
        self._cut = cut_axes(spec, tensor)
        self._units = {unit.name: unit for unit in units_of(spec)}
        self._model = meta_model(index.config, dtype)
        check_parameters(spec, self._model)
        reader = _GgufReader if index.kind == "gguf" else _SafetensorsReader
        self._reader: _GgufReader | _SafetensorsReader = reader(index, self._model, dtype)
        self._reader.require({p.name for u in self._units.values() for p in u.parameters}, spec)

    def load_unit(self, unit: str) -> Sequence[Mapping[str, torch.Tensor]]:
        """The unit's parameters for each wanted tp_rank. Raises CheckpointError naming the tensor."""
        parameters = self._units[unit].parameters
        whole = self._reader.read([p.name for p in parameters if p.dtype is None])
        for parameter in parameters:
            if parameter.dtype is not None:  # kept more exact than the rest: not by way of the model's dtype
                whole[parameter.name] = self._reader.stored(parameter.name).to(DTYPES[parameter.dtype])
        for parameter in parameters:
            tensor = whole[parameter.name]
            if tuple(tensor.shape) != parameter.shape:
                raise CheckpointError(
                    f"{self._index.path}: tensor {parameter.name} has shape {list(tensor.shape)}, "
                    f"but config.json says {list(parameter.shape)}"
                )
        return [
            {p.name: shard_tensor(whole[p.name], p, self._cut, rank) for p in parameters} for rank in self._tp_ranks
        ]


def shard_tensor(tensor: torch.Tensor, parameter: ParameterSpec, cut: AxisCut, tp_rank: int) -> torch.Tensor:
    """What a tensor rank holds of a parameter; a view where one interval is cut along the first dimension."""
    if parameter.split is None:
        return torch.zeros_like(tensor) if parameter.once and tp_rank > 0 else tensor
    parts = [
        tensor.narrow(parameter.split.dim, first, end - first)
        for first, end in shard_intervals(parameter, cut, tp_rank)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=parameter.split.dim)


class _Files:
    """pread on the checkpoint's files; descriptors live for one `read` call."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._root = Path(index.path) if Path(index.path).is_dir() else Path(index.path).parent
        self._index = index

    def bytes_of(self, entry: TensorEntry) -> bytearray:
        path = self._root / entry.file
        buffer = bytearray(entry.end - entry.start)
        view, done = memoryview(buffer), 0
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < len(buffer):
                    count = os.preadv(descriptor, [view[done : done + (64 << 20)]], entry.start + done)
                    if count == 0:
                        raise CheckpointError(
                            f"{path} ended inside tensor {entry.name}: {len(buffer)} bytes expected, {done} there; "
                            "the file changed or is truncated"
                        )
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {entry.name} from {path}: {error}") from error
        return buffer


class _SafetensorsReader:
    """Model parameters from safetensors, through the library's conversion of just the keys a unit needs."""

    def __init__(self, index: CheckpointIndex, model: Any, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._index, self._model, self._dtype, self._files = index, model, dtype, _Files(index)
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
        embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        self._tied = {"lm_head.weight": embedding} if "lm_head.weight" not in self._sources else {}

    def require(self, names: set[str], spec: ModelSpec) -> None:
        missing = sorted(n for n in names if self._tied.get(n, n) not in self._sources)
        if "lm_head.weight" in self._tied and not spec.tied:
            missing.append("lm_head.weight")
        if missing:
            raise CheckpointError(
                f"{self._index.path} lacks tensor {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + f", which {spec.model_type} with this config.json has"
            )

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        wanted = {self._tied.get(name, name): name for name in names}
        keys = {key for target in wanted for key in self._sources[target]}
        stored = {key: self._stored(self._index.tensors[key]) for key in sorted(keys)}
        # The library puts the result into the model; it is taken out again, and the meta parameters put back.
        before = {name: _place(self._model, name) for name in wanted}
        with _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(
                self._model, stored, LoadStateDictConfig(weight_mapping=self._mapping, dtype=self._dtype), None
            )
        if info.conversion_errors or info.mismatched_keys:
            problem = next(iter(info.conversion_errors.items()), None) or next(iter(info.mismatched_keys))
            raise CheckpointError(f"{self._index.path}: tensor does not fit the model: {problem}")
        result = {}
        for target, name in wanted.items():
            place, leaf, meta = before[target]
            tensor = place[leaf]
            if tensor is None or tensor.is_meta:
                raise CheckpointError(f"{self._index.path}: tensor {target} could not be made from {sorted(keys)[:3]}")
            result[name] = tensor.detach().to(self._dtype)
            place[leaf] = meta
        return result

    def stored(self, name: str) -> torch.Tensor:
        """A parameter that is stored as it is, in its stored type."""
        return self._stored(self._index.tensors[self._sources[name][0]])

    def _stored(self, entry: TensorEntry) -> torch.Tensor:
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._index.path}: tensor {entry.name} is stored as {entry.dtype}; float checkpoints "
                f"({', '.join(_DTYPES)}) are read, quantized safetensors are not"
            )
        return torch.frombuffer(self._files.bytes_of(entry), dtype=_DTYPES[entry.dtype]).reshape(entry.shape)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The library would draw one for every unit, across the packer's own."""
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


class _GgufReader:
    """Model parameters from GGUF blocks, dequantised to floats tensor by tensor."""

    def __init__(self, index: CheckpointIndex, model: Any, dtype: torch.dtype) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self._index, self._dtype, self._files = index, dtype, _Files(index)
        architecture = gguf_architecture(str(index.config["model_type"]))
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
        kind = next((kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
        if kind is None:
            raise CheckpointError(f"{index.path}: the gguf package knows no architecture {architecture!r}")
        # Not transformers' own map: it builds the package's table anew for each of the model's modules (5 s here).
        names = get_tensor_name_map(kind, model.config.num_hidden_layers)
        self._sources = {}
        for parameter in model.state_dict():
            stem, _, suffix = parameter.rpartition(".")
            source = f"{names.get_name(stem)}.{suffix}"
            if source in index.tensors:
                self._sources[parameter] = source
        if "lm_head.weight" not in self._sources and "token_embd.weight" in index.tensors:
            self._sources["lm_head.weight"] = "token_embd.weight"

    def require(self, names: set[str], spec: ModelSpec) -> None:
        missing = sorted(names - self._sources.keys())
        if missing:
            raise CheckpointError(
                f"{self._index.path} lacks a tensor for {missing[0]} (and {len(missing) - 1} more), or stores it in a "
                "form that is not read yet (packed experts of a GGUF, for one)"
            )

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: self._dequantised(self._index.tensors[self._sources[name]], self._dtype) for name in names}

    def stored(self, name: str) -> torch.Tensor:
        """A parameter as float32."""
        return self._dequantised(self._index.tensors[self._sources[name]], torch.float32)

    def _dequantised(self, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        kind = GGMLQuantizationType[entry.dtype]
        raw = np.frombuffer(self._files.bytes_of(entry), dtype=np.uint8)
        if entry.dtype in _DTYPES:
            stored = torch.from_numpy(raw).view(_DTYPES[entry.dtype]).reshape(entry.shape)
            return self._processed(entry.name, stored.float().numpy()).to(dtype)
        blocks = raw.reshape(quant_shape_to_byte_shape(entry.shape, kind))
        if entry.name not in _PLAIN:
            return self._processed(entry.name, dequantize(blocks, kind)).to(dtype)
        # The largest tensors, which no fix-up touches: in pieces, so that float32 temporaries stay small.
        result = torch.empty(entry.shape, dtype=dtype)
        step = max(1, _PIECE_ELEMENTS // entry.shape[-1])
        for first in range(0, entry.shape[0], step):
            result[first : first + step] = torch.from_numpy(dequantize(blocks[first : first + step], kind))
        return result

    def _processed(self, name: str, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """Undo what llama.cpp's converter did to this tensor (rotary row order, norms stored plus one)."""
        weights = self._processor.process(weights=values, name=name).weights
        return torch.from_numpy(np.ascontiguousarray(weights))
