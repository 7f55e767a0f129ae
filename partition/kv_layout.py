"""What every layer keeps of a token in the KV cache, and what that weighs.

Heads keep a key and a value each; latent attention keeps one compressed row for all heads, whole on every rank. A
windowed layer keeps a ring of its last rows for each running request. A type that is not packed keeps what it was seen
to keep in the library's own caches; its blocks are counted, not allocated.

    paged   row = block * block_tokens + offset       as many rows as there are blocks
    ring    row = slot * ring_rows + position % ring_rows      max_requests slots, whatever the length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partition.model_spec import ModelSpec
from partition.plan_data import DTYPE_BYTES
from partition.sharding import AxisCut, cut_axes, local_heads


@dataclass(frozen=True, kw_only=True)
class LayerKV:
    """One layer's rows on one rank, in elements: a key and a value row are [num_heads, key_dim | value_dim].

    `latent`: one row [1, key_dim] for all heads, no value of its own. `window`: what the ring was made for, where
    `ring_rows` > 0; a ring has so many rows a running request.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False
    window: int | None = None
    ring_rows: int = 0

    @property
    def row_elements(self) -> int:
        """Of one token."""
        return self.num_heads * (self.key_dim + self.value_dim)


def ring_rows_of(spec: ModelSpec, *, max_batch_tokens: int, max_model_len: int) -> tuple[int, ...]:
    """For each layer the rows of a request's ring; 0 where blocks hold no more than that.

    A micro-batch's new rows are written before its oldest query is done with the oldest key of its window.
    """
    windows = () if spec.latent_dim else spec.windows
    rings = (window + max_batch_tokens if window is not None else 0 for window in windows)
    return tuple(rows if rows < max_model_len else 0 for rows in rings)


def layers_kv(spec: ModelSpec, cut: AxisCut, tp_rank: int, ring_rows: Sequence[int] = ()) -> tuple[LayerKV, ...]:
    """Every layer of the model as this tensor rank keeps it. ring_rows: of the plan; () when nothing is in rings."""
    if spec.path != "packed":  # the library's own caches, of which only the sizes are known here
        return tuple(LayerKV(num_heads=1, key_dim=elements, value_dim=0) for elements in spec.kv_elements)
    latent = spec.latent_dim
    rings = tuple(ring_rows) or (0,) * spec.num_layers
    num_heads = 1 if latent else local_heads(spec, cut, tp_rank)[1]
    return tuple(
        LayerKV(
            num_heads=num_heads,
            key_dim=latent or spec.head_dim,
            value_dim=0 if latent else spec.v_head_dim,
            latent=latent > 0,
            window=spec.windows[layer] if rows else None,
            ring_rows=rows,
        )
        for layer, rows in enumerate(rings)
    )


def paged_bytes_per_token(layers: Sequence[LayerKV], dtype: str) -> int:
    """What one token takes of these layers' blocks."""
    return sum(layer.row_elements for layer in layers if not layer.ring_rows) * DTYPE_BYTES[dtype]


def ring_bytes_per_request(layers: Sequence[LayerKV], dtype: str) -> int:
    """What one running request takes of these layers' rings, however long it is."""
    return sum(layer.row_elements * layer.ring_rows for layer in layers) * DTYPE_BYTES[dtype]


def kv_bytes_per_token(spec: ModelSpec, dtype: str, *, tensor: int = 1, within_window: bool = True) -> int:
    """Bytes that one more token adds to the cache: all layers, all `tensor` ranks of each stage together.

    within_window: false for a token past every window, which windowed layers no longer add to.
    """
    cut = cut_axes(spec, tensor)
    kept = [layer for layer in range(spec.num_layers) if within_window or not (spec.windows and spec.windows[layer])]
    ranks = [layers_kv(spec, cut, tp_rank) for tp_rank in range(tensor)]
    return sum(paged_bytes_per_token([layers[layer] for layer in kept], dtype) for layers in ranks)
