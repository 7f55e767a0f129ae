"""What attention needs to know of one micro-batch: which rows are whose, and where their K/V rows lie.

Built once per step and micro-batch, used by every layer; published through `use_batch`, a thread-local context, because
not every model class passes keyword arguments down to its attention.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dist_infer.model.kv_cache import KVCache


@dataclass(frozen=True)
class SequenceSpan:
    """One sequence's part of a micro-batch.

    first, end: its rows in the packed row. length: context length after these rows. positions: where its `length`
    K/V rows lie in the paged pools; a slice when its blocks are consecutive (a view, no gather), else indices.
    slot: its ring in the layers that keep rings.
    """

    first: int
    end: int
    length: int
    positions: slice | torch.Tensor
    slot: int = 0

    @property
    def num_new(self) -> int:
        return self.end - self.first

    def first_key(self, window: int | None, row: int = 0) -> int:
        """The first position that new row `row` attends to."""
        query = self.length - self.num_new + row
        return 0 if window is None else max(0, query - window + 1)


@dataclass
class BatchView:
    """write_positions [T]: paged pool rows of the new tokens. ring_places [2, T]: their slots and their positions."""

    write_positions: torch.Tensor
    spans: tuple[SequenceSpan, ...]
    ring_places: torch.Tensor | None = None
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    ring_writes: dict[int, torch.Tensor] = field(default_factory=dict)

    def write_rows(self, ring_rows: int) -> torch.Tensor:
        """[T] pool rows of the new tokens in a layer with rings of so many rows; 0: in a paged one."""
        if ring_rows == 0:
            return self.write_positions
        if ring_rows not in self.ring_writes:
            if self.ring_places is None:
                raise RuntimeError("a layer keeps rings, but the micro-batch has no slots")
            slots, positions = self.ring_places
            self.ring_writes[ring_rows] = slots * ring_rows + positions % ring_rows
        return self.ring_writes[ring_rows]

    def mask(self, index: int, rows: slice, rep: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Boolean [rep*n, C'] (True = attend) for `rows` (n new tokens) of span `index`.

        The C' keys are those from the first that the first of these rows attends to, up to the last row's own. None
        when every row may see all of them. Kept for the other layers where `rows` are the whole span.
        """
        if rows.stop - rows.start == 1:
            return None
        key = (index, rep, window)
        mask = self.masks.get(key)
        if mask is None:
            span = self.spans[index]
            before = span.length - span.num_new
            query = torch.arange(before + rows.start, before + rows.stop, device=device)[:, None]
            keys = torch.arange(span.first_key(window, rows.start), before + rows.stop, device=device)[None]
            mask = keys <= query
            if window is not None:
                mask &= keys > query - window
            mask = mask.repeat(rep, 1)
            if rows.stop - rows.start == span.num_new:
                self.masks[key] = mask
        return mask


class _Active(threading.local):
    found: tuple[BatchView, KVCache] | None = None


_active = _Active()


@contextmanager
def use_batch(batch: BatchView, cache: KVCache) -> Iterator[None]:
    """Publish the micro-batch to the attention calls of this thread."""
    _active.found = batch, cache
    try:
        yield
    finally:
        _active.found = None


def active_batch() -> tuple[BatchView, KVCache]:
    """What this thread computes. RuntimeError outside of `use_batch`."""
    if _active.found is None:
        raise RuntimeError("paged attention outside of a step")
    return _active.found
