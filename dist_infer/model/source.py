"""Where packed units come from: a checkpoint, converted to the model's parameters, cut for every tensor rank, encoded.

Reads one parameter at a time by pread (never mmap). Peak memory: the unit's parts in their at-rest encodings, and one
parameter as stored and as converted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dist_infer.model.adapter import check_parameters, meta_model
from dist_infer.model.gguf_source import GgufReader
from dist_infer.model.safetensors_source import SafetensorsReader
from dist_infer.model.shards import ParameterReader, Stored, Wanted
from partition.checkpoint import CheckpointIndex
from partition.encoding import EncodingChoice
from partition.model_spec import ModelSpec
from partition.sharding import cut_axes, shard_shape, units_of

_FLOAT = EncodingChoice()


class CheckpointSource:
    """Implements `offload.pack.WeightSource` for one checkpoint, tensor degree, dtype and choice of encodings.

    `reader` gives single parameters.
    """

    def __init__(
        self,
        *,
        index: CheckpointIndex,
        spec: ModelSpec,
        tensor: int,
        tp_ranks: Sequence[int],
        dtype: torch.dtype,
        encodings: EncodingChoice = _FLOAT,
    ) -> None:
        self._tp_ranks, self._encodings = tuple(tp_ranks), encodings
        self._cut = cut_axes(spec, tensor)
        self._units = {unit.name: unit for unit in units_of(spec)}
        model = meta_model(index.config, dtype, path=spec.path)
        check_parameters(spec, model)
        self.reader: ParameterReader
        if index.kind == "gguf":
            self.reader = GgufReader(index, spec, model, dtype)
        else:
            self.reader = SafetensorsReader(index, spec, model, dtype)
        self.reader.require({p.name for unit in self._units.values() for p in unit.parameters})

    def load_unit(self, unit: str) -> Sequence[Mapping[str, Stored]]:
        """The unit's parameters for each wanted tp_rank. Raises CheckpointError naming tensor and file."""
        ranks: list[dict[str, Stored]] = [{} for _ in self._tp_ranks]
        for parameter in self._units[unit].parameters:
            shapes = [shard_shape(parameter, self._cut, rank) for rank in self._tp_ranks]
            wanted = [
                Wanted(tp_rank=rank, encoding=self._encodings.of(unit, parameter, shape), shape=shape)
                for rank, shape in zip(self._tp_ranks, shapes, strict=True)
            ]
            for held, part in zip(ranks, self.reader.parts(parameter, self._cut, wanted), strict=True):
                held[parameter.name] = part
        return ranks
