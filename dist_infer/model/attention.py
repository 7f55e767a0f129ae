"""Attention over the paged KV cache, registered with transformers as an attention implementation.

Not here: block allocation (engine), the weights (streamer). The batch of the moment is published through `use_batch`,
a thread-local context, because not every model class passes keyword arguments down to its attention.

Shapes: T tokens of the packed row, Hq/Hk local query/KV heads, D head dim, C context length, N new tokens of one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from partition.plan_data import ATTENTION_SCORES

NAME = "dist_infer_paged"
MAX_SCORES = ATTENTION_SCORES  # of one call, query rows × keys: what masks and explicit scores may take


@dataclass(frozen=True)
class SequenceSpan:
    """One sequence's part of a micro-batch.

    first, end: its rows in the packed row. length: context length after these rows. positions: where its `length`
    K/V rows lie in the pool; a slice when its blocks are consecutive (a view, no gather), else indices.
    """

    first: int
    end: int
    length: int
    positions: slice | torch.Tensor


@dataclass
class BatchView:
    """What attention needs to know of one micro-batch; built once per step, used by every layer."""

    write_positions: torch.Tensor  # [T] pool rows of the new tokens
    spans: tuple[SequenceSpan, ...]
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, index: int, rows: slice, rep: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Boolean [rep*n, C'] (True = attend) for `rows` (n of N new tokens) of span `index`, C' keys up to the last.

        None when a single token may see all. Kept for the other layers where the span is one slice.
        """
        span = self.spans[index]
        new = span.end - span.first
        if new == 1 and window is None:
            return None
        key = (index, rep, window)
        mask = self.masks.get(key)
        if mask is None:
            first = span.length - new
            query = torch.arange(first + rows.start, first + rows.stop, device=device)[:, None]
            keys = torch.arange(first + rows.stop, device=device)[None]
            mask = keys <= query
            if window is not None:
                mask &= keys > query - window
            mask = mask.repeat(rep, 1)
            if rows.stop - rows.start == new:
                self.masks[key] = mask
        return mask


class KVCache:
    """K and V pools of the layers of one stage and rank: [num_rows, Hk, D] each, allocated once."""

    def __init__(
        self,
        layers: Sequence[int],
        num_rows: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Layers side by side in one allocation; zeroed, since a masked NaN times zero is still NaN.
        self.keys = torch.zeros(len(layers), num_rows, num_heads, key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(len(layers), num_rows, num_heads, value_dim, dtype=dtype, device=device)
        self._row_of = {layer: row for row, layer in enumerate(layers)}
        self._touched: set[int] = set()

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def untouched(self) -> list[int]:
        """Layers that no attention call has used yet."""
        return sorted(self._row_of.keys() - self._touched)

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self._row_of[layer]
        self._touched.add(layer)
        return self.keys[row], self.values[row]


class _Active(threading.local):
    batch: BatchView | None = None
    cache: KVCache | None = None


_active = _Active()


@contextmanager
def use_batch(batch: BatchView, cache: KVCache) -> Iterator[None]:
    """Publish the micro-batch to the attention calls of this thread."""
    _active.batch, _active.cache = batch, cache
    try:
        yield
    finally:
        _active.batch = _active.cache = None


def paged_attention(
    module: Any,
    query: torch.Tensor,  # [1, Hq, T, D]
    key: torch.Tensor,  # [1, Hk, T, D]
    value: torch.Tensor,  # [1, Hk, T, Dv]
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,  # transformers passes what it likes; what changes the numbers is named above
) -> tuple[torch.Tensor, None]:
    """Write the new K/V rows, attend per sequence; returns ([1, T, Hq, Dv], None) as the interface wants it.

    The window is taken from the keyword alone, even when it is None: the module attribute lies for some families.
    """
    batch, cache = _active.batch, _active.cache
    if batch is None or cache is None:
        raise RuntimeError("paged attention outside of a step")
    key_pool, value_pool = cache.pools(module.layer_idx)
    key_pool[batch.write_positions] = key[0].transpose(0, 1)
    value_pool[batch.write_positions] = value[0].transpose(0, 1)
    num_query_heads, num_kv_heads = query.shape[1], key.shape[1]
    rep = num_query_heads // num_kv_heads
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    outputs = []
    for index, span in enumerate(batch.spans):
        new = span.end - span.first
        alone = new == 1 and sliding_window is not None and span.length > sliding_window
        positions = _tail(span, sliding_window or 0) if alone else span.positions
        window = None if new == 1 else sliding_window
        k = key_pool[positions].transpose(0, 1)[None]
        v = value_pool[positions].transpose(0, 1)[None]
        step = max(1, MAX_SCORES // (rep * span.length))
        for start in range(0, new, step):
            rows = slice(start, min(start + step, new))
            # Query heads of one KV group are folded into the rows, so that K and V are never repeated.
            q = query[0, :, span.first + rows.start : span.first + rows.stop]
            q = q.reshape(1, num_kv_heads, rep * q.shape[1], q.shape[-1])
            mask = batch.mask(index, rows, rep, window, query.device)
            num_keys = k.shape[2] - (new - rows.stop)
            if softcap is None and s_aux is None:
                out = scaled_dot_product_attention(
                    q, k[:, :, :num_keys], v[:, :, :num_keys], attn_mask=mask, scale=scale
                )
            else:
                out = _explicit_attention(q, k[:, :, :num_keys], v[:, :, :num_keys], mask, scale, softcap, s_aux, rep)
            outputs.append(out.reshape(num_query_heads, rows.stop - rows.start, value.shape[-1]))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return joined.transpose(0, 1)[None], None


def _tail(span: SequenceSpan, window: int) -> slice | torch.Tensor:
    if isinstance(span.positions, slice):
        return slice(span.positions.stop - window, span.positions.stop)
    return span.positions[-window:]


def _explicit_attention(
    q: torch.Tensor,  # [1, Hk, rep*N, D]
    k: torch.Tensor,  # [1, Hk, C, D]
    v: torch.Tensor,  # [1, Hk, C, Dv]
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,  # [Hq] one extra logit a head, takes probability and gives nothing
    rep: int,
) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        rows = sinks.float().reshape(k.shape[1], rep, 1).expand(-1, -1, q.shape[2] // rep)
        scores = torch.cat([scores, rows.reshape(1, k.shape[1], -1, 1)], dim=-1)
        probabilities = scores.softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    return probabilities.to(v.dtype) @ v
