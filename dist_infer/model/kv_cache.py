"""The KV cache of one stage and rank: a pool of rows for every layer, in blocks or in rings (partition.kv_layout).

    ring of 6 rows, window 4, positions 0-7 written:     row   0 1 2 3 4 5
                                                         holds 6 7 2 3 4 5     a token at 7 reads 4 5 | 6 7: two parts

Not here: who owns which block or slot (engine, request table), masks (batch view).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from partition.kv_layout import LayerKV

Rows = slice | torch.Tensor


class KVCache:
    """Key and value rows [num_heads, dim] by layer, allocated once. Latent layers have one row a token and no values.

    num_rows: of every paged layer. num_slots: rings of every layer that keeps rings.
    """

    def __init__(
        self, layers: Mapping[int, LayerKV], num_rows: int, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers = dict(layers)
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stacks: dict[LayerKV, tuple[torch.Tensor, torch.Tensor]] = {}
        for kind in dict.fromkeys(layers.values()):
            own = [layer for layer, of_layer in layers.items() if of_layer == kind]
            rows = num_slots * kind.ring_rows if kind.ring_rows else num_rows
            # Layers of a kind in one allocation; zeroed, since a masked NaN times zero is still NaN.
            keys, values = (
                torch.zeros(len(own), rows, kind.num_heads, dim, dtype=dtype, device=device)
                for dim in (kind.key_dim, kind.value_dim)
            )
            self._stacks[kind] = keys, values
            self._pools |= {layer: (keys[at], values[at]) for at, layer in enumerate(own)}
        self._touched: set[int] = set()

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._stacks.values())

    def untouched(self) -> list[int]:
        """Layers that no attention call has used yet."""
        return sorted(self._layers.keys() - self._touched)

    def kind(self, layer: int) -> LayerKV:
        """How this layer keeps its rows."""
        return self._layers[layer]

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, heads, dim] of keys and of values; marks the layer as used."""
        self._touched.add(layer)
        return self._pools[layer]

    def read(self, layer: int, rows: Rows, slot: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [first, end), in order: views where they lie together, else copies.

        rows: where a paged layer has positions [0, end) at least. slot: the ring otherwise.
        """
        keys, values = self.pools(layer)
        ring = self._layers[layer].ring_rows
        if not ring:
            part = slice(rows.start + first, rows.start + end) if isinstance(rows, slice) else rows[first:end]
            return keys[part], values[part]
        if end - first > ring:
            raise RuntimeError(f"layer {layer}: positions [{first}, {end}) of a ring of {ring} rows")
        base, start = slot * ring, first % ring
        stop = start + end - first
        if stop <= ring:
            part = slice(base + start, base + stop)
            return keys[part], values[part]
        parts = slice(base + start, base + ring), slice(base, base + stop - ring)
        return torch.cat([keys[part] for part in parts]), torch.cat([values[part] for part in parts])

    def copy_rows(self, source: Rows, target: Rows) -> None:
        """The source rows' contents to the target rows, in all paged layers."""
        for kind, stack in self._stacks.items():
            if not kind.ring_rows:
                for pool in stack:
                    pool[:, target] = pool[:, source].clone()  # torch refuses to read and write one pool at a time

    def copy_slot(self, source: int, target: int) -> None:
        """The ring of one request to another's, in all layers that keep rings."""
        for kind, stack in self._stacks.items():
            rows = kind.ring_rows
            for pool in stack if rows else ():
                pool[:, target * rows : (target + 1) * rows] = pool[:, source * rows : (source + 1) * rows]
