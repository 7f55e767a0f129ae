"""What a unit's blob holds on one rank: its arrays in order. The packer lays out just these, the planner weighs them.

parameters in the unit's order; a raw one is one array, an encoded one its parts, one after another
q_proj.codes  q_proj.scales  k_proj.codes  k_proj.scales  …  input_layernorm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from partition.encoding import RAW, EncodingChoice, parts_of
from partition.layout import blob_layout
from partition.plan_data import DTYPE_BYTES
from partition.sharding import AxisCut, UnitSpec, shard_shape

FLOAT = EncodingChoice()
_ELEMENT_BYTES = {**DTYPE_BYTES, "uint8": 1}


@dataclass(frozen=True, kw_only=True)
class BlobArray:
    """One array. `part` names which one of an encoded parameter, and is empty for a raw one. dtype by torch's name."""

    parameter: str
    encoding: str
    part: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ELEMENT_BYTES[self.dtype]


def blob_arrays(
    unit: UnitSpec, cut: AxisCut, tp_rank: int, dtype: str, encodings: EncodingChoice = FLOAT
) -> tuple[BlobArray, ...]:
    """The arrays of a rank's blob, in order. dtype: the one that is computed in."""
    arrays = []
    for parameter in unit.parameters:
        shape = shard_shape(parameter, cut, tp_rank)
        encoding = encodings.of(unit.name, parameter, shape)
        if encoding == RAW:
            arrays.append(
                BlobArray(parameter=parameter.name, encoding=RAW, part="", dtype=parameter.dtype_in(dtype), shape=shape)
            )
            continue
        arrays += [
            BlobArray(parameter=parameter.name, encoding=encoding, part=part.name, dtype=part.dtype, shape=part.shape)
            for part in parts_of(encoding, shape)
        ]
    return tuple(arrays)


def blob_bytes(arrays: Sequence[BlobArray]) -> int:
    """Length of the packed blob of these arrays."""
    return blob_layout([array.num_bytes for array in arrays])[1]


def unit_bytes(unit: UnitSpec, cut: AxisCut, tp_rank: int, dtype: str, encodings: EncodingChoice = FLOAT) -> int:
    """Length of the rank's packed blob of a unit."""
    return blob_bytes(blob_arrays(unit, cut, tp_rank, dtype, encodings))


def decoded_bytes(unit: UnitSpec, cut: AxisCut, tp_rank: int, dtype: str, encodings: EncodingChoice = FLOAT) -> int:
    """The largest encoded matrix of a unit (of an expert stack one expert), decoded; 0 where nothing is encoded."""
    largest = 0
    for parameter in unit.parameters:
        shape = shard_shape(parameter, cut, tp_rank)
        if encodings.of(unit.name, parameter, shape) != RAW:
            largest = max(largest, math.prod(shape[-2:]) * DTYPE_BYTES[dtype])
    return largest
