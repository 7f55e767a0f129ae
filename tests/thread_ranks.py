"""Tensor ranks as threads of one process: a whole model's logits at any degree, in milliseconds."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dist_infer.model.adapter import StageModel
from dist_infer.model.batch_view import BatchView, SequenceSpan, use_batch
from dist_infer.model.kv_cache import KVCache
from dist_infer.model.source import CheckpointSource
from partition.checkpoint import open_checkpoint
from partition.kv_layout import layers_kv
from partition.model_spec import ModelSpec
from partition.sharding import cut_axes, units_of


class Shared:
    """What the ranks of one group hand each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.given: list[torch.Tensor | None] = [None] * size


class ThreadRank:
    """A TensorParallel of ranks that are threads of one process."""

    seconds = 0.0

    def __init__(self, shared: Shared, rank: int) -> None:
        self._shared, self._rank = shared, rank
        self.size = shared.size

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._shared.given[self._rank] = tensor.clone()
        self._shared.barrier.wait()
        found = [one for one in self._shared.given if one is not None]
        self._shared.barrier.wait()
        return found

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def gather_columns(self, tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        parts = self._exchange(tensor)
        assert tuple(part.shape[-1] for part in parts) == widths
        return torch.cat(parts, dim=-1) if self._rank == 0 else tensor


def logits_of(
    path: Path, ids: Sequence[int], *, tensor: int = 1, dtype: torch.dtype = torch.float32, cuts: Sequence[int] = (8,)
) -> torch.Tensor:
    """[len(ids), vocab]: one prompt, in chunks that end at `cuts`, through all layers; every rank on a thread."""
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    source = CheckpointSource(index=index, spec=spec, tensor=tensor, tp_ranks=range(tensor), dtype=dtype)
    units = {unit.name: source.load_unit(unit.name) for unit in units_of(spec)}
    cut, shared = cut_axes(spec, tensor), Shared(tensor)

    @torch.inference_mode()
    def rank(tp_rank: int) -> torch.Tensor:
        try:
            model = StageModel(
                spec=spec,
                config=index.config,
                dtype=dtype,
                device=torch.device("cpu"),
                first_layer=0,
                end_layer=spec.num_layers,
                tp_rank=tp_rank,
                group=ThreadRank(shared, tp_rank),
            )
            kept = dict(enumerate(layers_kv(spec, cut, tp_rank)))
            cache = KVCache(kept, len(ids), 0, dtype, torch.device("cpu"))
            for name, parts in units.items():
                model.bind(name, parts[tp_rank])
            found = []
            for first, end in itertools.pairwise((0, *cuts, len(ids))):
                positions = torch.arange(first, end)
                calls = model.begin(torch.tensor([ids[first:end]]), positions[None], None)
                view = BatchView(positions, (SequenceSpan(0, end - first, end, slice(0, end)),))
                for layer in range(spec.num_layers):
                    with use_batch(view, cache):
                        model.layer(layer, calls)
                found.append(model.finish(calls, torch.arange(end - first)))
            return torch.cat(found)
        except BaseException:
            shared.barrier.abort()
            raise

    with ThreadPoolExecutor(tensor) as pool:
        return next(iter(list(pool.map(rank, range(tensor)))))
