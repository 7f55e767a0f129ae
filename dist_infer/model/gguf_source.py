"""Parameters from GGUF: any type as floats, or the blocks' own codes where an encoding of ours holds them.

A matrix is never dequantised whole. For each rank it is known which row of which tensor every row of its part is (the
rotary row order of q and k, the gate and up halves of experts and the cut over ranks are all permutations of rows), and
the part is put together from pieces of rows, which threads prepare ahead.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_infer.model.adapter import DTYPES, name_of
from dist_infer.model.checkpoint_files import CheckpointFiles
from dist_infer.model.gguf_blocks import Codes, can_dequantise, codes_of, floats_of
from dist_infer.model.gguf_tiles import scales_fit, tiles_of
from dist_infer.model.shards import Assembly, Stored, Wanted, kept_as, shard_tensor
from partition.checkpoint_index import CheckpointIndex, TensorEntry
from partition.encoding import LEAST_GROUP, RAW, ROWS_PER_TILE
from partition.errors import CheckpointError, UnsupportedModelError
from partition.gguf_config import gguf_architecture
from partition.gguf_names import gguf_sources
from partition.gguf_types import TENSOR_TYPES
from partition.model_spec import ModelSpec
from partition.sharding import AxisCut, Interval, ParameterSpec, shard_intervals

_PIECE_ELEMENTS = 1 << 20
_MOST_THREADS = 4  # of Python, with the interpreter's lock between them; more of them only wait
_BLOCKS = {name: (block, size) for name, block, size in TENSOR_TYPES.values()}

Rows = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _StoredTensor:
    """blocks: uint8 [rows, blocks of a row, bytes of a block]."""

    entry: TensorEntry
    blocks: Bytes


class GgufReader:
    """Implements `ParameterReader`."""

    def __init__(self, index: CheckpointIndex, spec: ModelSpec, model: Any, dtype: torch.dtype) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self._index, self._dtype, self._files = index, dtype, CheckpointFiles(index)
        processor = TENSOR_PROCESSORS.get(gguf_architecture(spec.model_type), TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        self._sources = gguf_sources(spec, index.tensors)
        unknown = {kind for kind in {entry.dtype for entry in index.tensors.values()} if not can_dequantise(kind)}
        for entry in index.tensors.values():
            if entry.dtype in unknown:
                raise UnsupportedModelError(
                    f"{self._files.where(entry)}: tensor {entry.name} is of type {entry.dtype}, which the installed "
                    "gguf package cannot dequantise: install a newer one, or use a file of other types"
                )

    def require(self, names: set[str]) -> None:
        lacking = sorted(n for n in names if any(s not in self._index.tensors for s in self._sources.get(n, (n,))))
        if lacking:
            tensors = " and ".join(self._sources.get(lacking[0], (lacking[0],)))
            raise CheckpointError(
                f"{self._index.path} lacks tensor {tensors} for {lacking[0]}"
                + (f" and for {len(lacking) - 1} more parameters" if len(lacking) > 1 else "")
            )

    def parts(self, parameter: ParameterSpec, cut: AxisCut, wanted: Sequence[Wanted]) -> list[Stored]:
        entries = [self._index.tensors[name] for name in self._sources[parameter.name]]
        self._check_shapes(parameter, entries)
        dtype = DTYPES[parameter.dtype_in(name_of(self._dtype))]
        stored = [self._read(entry) for entry in entries]
        if len(parameter.shape) < 2:
            whole = self._vector(stored[0]).to(dtype)
            return [shard_tensor(whole, parameter, cut, part.tp_rank) for part in wanted]
        rows = self._row_numbers(parameter, entries)
        return [self._part(parameter, cut, part, stored, rows, dtype) for part in wanted]

    def _check_shapes(self, parameter: ParameterSpec, entries: Sequence[TensorEntry]) -> None:
        shape = parameter.shape
        if len(entries) > 1:
            shape = (*shape[:-2], shape[-2] // len(entries), shape[-1])
        for entry in entries:
            if entry.shape != shape:
                raise CheckpointError(
                    f"{self._files.where(entry)}: tensor {entry.name} has shape {list(entry.shape)}, but the metadata "
                    f"says {list(shape)}"
                )

    def _read(self, entry: TensorEntry) -> _StoredTensor:
        block, size = _BLOCKS[entry.dtype]
        raw = np.frombuffer(self._files.bytes_of(entry), dtype=np.uint8)
        columns = entry.shape[-1] if entry.shape else 1
        return _StoredTensor(entry, raw.reshape(-1, columns // block, size))

    def _vector(self, stored: _StoredTensor) -> torch.Tensor:
        """A norm or bias in float32, with what llama.cpp's converter did to it undone (norms stored plus one)."""
        values = floats_of(stored.entry.dtype, stored.blocks[0]).reshape(stored.entry.shape).numpy()
        weights = self._processor.process(weights=values, name=stored.entry.name).weights
        return torch.from_numpy(np.ascontiguousarray(weights))

    def _row_numbers(self, parameter: ParameterSpec, entries: Sequence[TensorEntry]) -> Rows:
        """[.., rows]: for each row of the parameter its number among the rows of all tensors, one behind another.

        The processor is given row numbers in place of weights, so that its order of rows is known for codes as well.
        """
        numbers = []
        for index, entry in enumerate(entries):
            count = int(np.prod(entry.shape[:-1]))
            own = np.arange(count, dtype=np.int64).reshape(*entry.shape[:-1], 1)
            if len(entry.shape) == 2:
                own = np.asarray(self._processor.process(weights=own, name=entry.name).weights)
            if own.shape != (*entry.shape[:-1], 1) or not np.array_equal(np.sort(own, axis=None), np.arange(count)):
                raise RuntimeError(f"transformers changes more than the order of rows of {entry.name}")
            numbers.append(own[..., 0] + index * count)
        return np.concatenate(numbers, axis=-1)

    def _part(
        self,
        parameter: ParameterSpec,
        cut: AxisCut,
        wanted: Wanted,
        stored: Sequence[_StoredTensor],
        rows: Rows,
        dtype: torch.dtype,
    ) -> Stored:
        split = parameter.split
        columns: tuple[Interval, ...] = ((0, parameter.shape[-1]),)
        if split is not None:
            intervals = shard_intervals(parameter, cut, wanted.tp_rank)
            if split.dim == len(parameter.shape) - 1:
                columns = intervals
            else:
                kept = [np.arange(first, end) for first, end in intervals]
                rows = np.take(rows, np.concatenate(kept), axis=split.dim)
        flat = rows.reshape(-1)
        width = sum(end - first for first, end in columns)
        step = max(1, _PIECE_ELEMENTS // max(1, width) // ROWS_PER_TILE) * ROWS_PER_TILE
        assembly = Assembly(wanted, dtype)
        names = " and ".join(tensor.entry.name for tensor in stored)
        where = f"tensor {names} of {self._files.where(stored[0].entry)}"

        def prepare(first: int) -> tuple[int, Stored]:
            return first, self._piece(stored, flat[first : first + step], columns, wanted.encoding)

        for first, piece in _ahead(prepare, range(0, len(flat), step)):
            if isinstance(piece, torch.Tensor):
                piece = kept_as(piece, wanted.encoding, self._dtype, where=f"{where}, rows from {first} on:")
            assembly.put(first, piece)
        return assembly.done()

    def _piece(self, stored: Sequence[_StoredTensor], rows: Rows, columns: Sequence[Interval], encoding: str) -> Stored:
        """Rows of a part, in its order: encoded where every one of them has codes of its own, else float32."""
        count = len(stored[0].blocks)
        edges = [0, *(np.flatnonzero(np.diff(rows // count)) + 1).tolist(), len(rows)]
        runs = [
            (stored[int(rows[first]) // count], _selected(rows[first:end] % count))
            for first, end in itertools.pairwise(edges)
            if end > first
        ]
        if encoding != RAW:
            pieces = [_codes(tensor, selected, columns, encoding) for tensor, selected in runs]
            found = [piece for piece in pieces if piece is not None]
            if len(found) == len(runs) and scales_fit(joined := _joined(found)):
                return tiles_of(encoding, joined, self._dtype)  # else encoding the floats says what is wrong
        floats = [_floats(tensor, selected, columns) for tensor, selected in runs]
        return floats[0] if len(floats) == 1 else torch.cat(floats)


def _joined(pieces: Sequence[Codes]) -> Codes:
    """One below the other; all or none have minima, being of one encoding."""
    if len(pieces) == 1:
        return pieces[0]
    minima = [piece.minima for piece in pieces if piece.minima is not None]
    return Codes(
        codes=np.concatenate([piece.codes for piece in pieces]),
        scales=np.concatenate([piece.scales for piece in pieces]),
        minima=np.concatenate(minima) if minima else None,
    )


def _selected(rows: Rows) -> Rows | slice:
    """Rows one behind another as a slice, which costs no copy."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all()):
        return slice(first, last + 1)
    return rows


def _floats(tensor: _StoredTensor, rows: Rows | slice, columns: Sequence[Interval]) -> torch.Tensor:
    """[rows, columns of all intervals] float32; only the blocks that they touch are dequantised."""
    block, size = _BLOCKS[tensor.entry.dtype]
    parts = []
    for first, end in columns:
        touched = tensor.blocks[rows, first // block : -(-end // block)]
        values = floats_of(tensor.entry.dtype, touched.reshape(-1, size)).reshape(len(touched), -1)
        parts.append(values[:, first % block : first % block + end - first])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _codes(tensor: _StoredTensor, rows: Rows | slice, columns: Sequence[Interval], encoding: str) -> Codes | None:
    """The same as codes and scales; None where the type has none in this encoding or groups would be cut."""
    block, size = _BLOCKS[tensor.entry.dtype]
    if len(columns) != 1 or columns[0][0] % LEAST_GROUP or columns[0][1] % LEAST_GROUP:
        return None
    first, end = columns[0]
    touched = tensor.blocks[rows, first // block : -(-end // block)]
    found = codes_of(tensor.entry.dtype, encoding, touched.reshape(-1, size))
    if found is None:
        return None

    def inside(values: NDArray[Any], unit: int) -> NDArray[Any]:
        """The columns wanted, of whole blocks; one value stands for `unit` columns."""
        at = first % block // unit
        return values.reshape(len(touched), -1)[:, at : at + (end - first) // unit]

    minima = None if found.minima is None else inside(found.minima, LEAST_GROUP)
    return Codes(codes=inside(found.codes, 1), scales=inside(found.scales, LEAST_GROUP), minima=minima)


def _ahead(prepare: Callable[[int], tuple[int, Stored]], firsts: range) -> Iterator[tuple[int, Stored]]:
    """The pieces in order; threads are at most two pieces each ahead, so that memory stays bounded."""
    if len(firsts) < 2:
        yield from map(prepare, firsts)
        return
    num_threads = min(_MOST_THREADS, torch.get_num_threads(), len(firsts))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="dist-infer-dequantise") as threads:
        waiting: deque[Future[tuple[int, Stored]]] = deque()
        try:
            for first in firsts:
                waiting.append(threads.submit(prepare, first))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
