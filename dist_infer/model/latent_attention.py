"""Multi-head latent attention over a cache that holds the latent alone.

The model class compresses K and V of all heads into one row [latent | rotary key] and expands it again before it calls
attention. `keep_latent` takes the expansion out of it, so that attention here gets, and the cache keeps, that row. With
W_K [H, Dn, R] and W_V [H, Dv, R] of the expansion, scores and output are the same in two ways:

    absorbed   ((q_nope W_K) c + q_rope k_rope) … W_V (probabilities c)     few new tokens: nothing grows with C·H
    expanded   q [W_K c | k_rope] … probabilities (W_V c)                    many: R per score becomes Dn

Shapes: H local heads, Dn/Dr no-position/rotary dims of q and k, Dv value dim, R latent rank, C context, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from dist_infer.model.batch_view import BatchView, SequenceSpan
from dist_infer.model.kv_cache import KVCache
from partition.errors import UnsupportedModelError
from partition.plan_data import ATTENTION_SCORES, LATENT_ELEMENTS

_NEEDS = ("expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def latent_dim_of(layer: nn.Module) -> int:
    """R + Dr of a decoder layer with one latent attention, else 0."""
    found = _latent_modules(layer)
    return int(found[0].kv_lora_rank) + int(found[0].qk_rope_head_dim) if len(found) == 1 else 0


def keep_latent(layer: nn.Module) -> None:
    """Make this decoder layer's attention hand over [latent | rotary key] where it would hand over expanded keys."""
    found = _latent_modules(layer)
    if len(found) != 1:
        raise UnsupportedModelError(f"{type(layer).__name__} has no latent attention that could keep its KV compressed")
    found[0].expand_kv = _joined  # an instance attribute in front of the method


def _latent_modules(layer: nn.Module) -> list[Any]:
    return [module for module in layer.modules() if all(hasattr(module, name) for name in _NEEDS)]


def _joined(latent: Tensor, rotary_key: Tensor) -> tuple[Tensor, Tensor]:
    """[1, 1, T, R] and [1, 1, T, Dr] -> [1, 1, T, R + Dr], and no value."""
    row = torch.cat([latent, rotary_key], dim=-1)
    return row, row[..., :0]


def latent_attention(
    module: Any,
    query: Tensor,  # [1, H, T, Dn + Dr]
    row: Tensor,  # [1, 1, T, R + Dr]
    scaling: float | None,
    batch: BatchView,
    cache: KVCache,
) -> Tensor:
    """Write the new rows, attend per sequence: [1, T, H, Dv]."""
    layer = module.layer_idx
    if row.shape[1] != 1 or row.shape[-1] != cache.kind(layer).key_dim:
        raise RuntimeError(f"layer {layer}: KV rows of {tuple(row.shape)} where the latent was to come")
    cache.pools(layer)[0][batch.write_positions] = row[0].transpose(0, 1)
    heads, num_tokens = query.shape[1], query.shape[2]
    expansion = _Expansion(module, heads)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    output = query.new_empty(heads, num_tokens, expansion.v_dim)
    absorbed: list[tuple[int, SequenceSpan]] = []

    def context(span: SequenceSpan) -> Tensor:
        """[C, R + Dr]; may be a copy, so one at a time."""
        return cache.read(layer, span.positions, span.slot, 0, span.length)[0][:, 0]

    for index, span in enumerate(batch.spans):
        if expansion.is_cheaper(span.num_new, span.length):
            _expanded(query[0], context(span), index, span, batch, expansion, scale, output)
        else:
            absorbed.append((index, span))
    if absorbed:
        _absorbed(query[0], absorbed, context, batch, expansion, scale, output)
    return output.transpose(0, 1)[None]


class _Expansion:
    """The weight that expands latents, by head: keys [H, Dn, R], values [H, Dv, R]. It is a float in every encoding."""

    def __init__(self, module: Any, heads: int) -> None:
        weight: Tensor = module.kv_b_proj.weight
        self.nope, self.rope = int(module.qk_nope_head_dim), int(module.qk_rope_head_dim)
        self.v_dim, self.rank = int(module.v_head_dim), int(module.kv_lora_rank)
        by_head = weight.view(heads, self.nope + self.v_dim, self.rank)
        self.keys, self.values = by_head[:, : self.nope], by_head[:, self.nope :]

    def out_of_latent(self, mixed: Tensor) -> Tensor:
        """[H, N, R] -> [H, N, Dv]. In half precision the weight goes first: 4 to 6 times as fast on a CPU."""
        if mixed.dtype == torch.float32:
            return mixed @ self.values.transpose(1, 2)
        return (self.values @ mixed.transpose(1, 2)).transpose(1, 2)

    def is_cheaper(self, new: int, length: int) -> bool:
        """Whether expanding `length` latents costs fewer multiplications a head than absorbing `new` queries."""
        both = self.rank * (self.nope + self.v_dim)
        expanded = length * both + new * length * (self.nope + self.rope + self.v_dim)
        return expanded < new * (both + length * (2 * self.rank + self.rope))


def _absorbed(
    query: Tensor,  # [H, T, Dn + Dr]
    spans: list[tuple[int, SequenceSpan]],
    context: Callable[[SequenceSpan], Tensor],
    batch: BatchView,
    expansion: _Expansion,
    scale: float,
    output: Tensor,  # [H, T, Dv]
) -> None:
    """Query rows of all spans go into latent space together: the weight is read once for many sequences."""
    heads, rank = query.shape[0], expansion.rank
    width = rank + expansion.rope
    room = max(1, LATENT_ELEMENTS // (heads * (width + rank)))
    for part in _parts(spans, room):
        picked = torch.cat([query[:, span.first + rows.start : span.first + rows.stop] for _, span, rows in part], 1)
        latent = torch.cat([picked[..., : expansion.nope] @ expansion.keys, picked[..., expansion.nope :]], dim=-1)
        mixed = latent.new_empty(heads, latent.shape[1], rank)
        at = 0
        for index, span, rows in part:
            before = span.length - span.num_new
            known = context(span)
            step = max(1, ATTENTION_SCORES // (heads * (before + rows.stop)))
            for start in range(rows.start, rows.stop, step):
                some = slice(start, min(start + step, rows.stop))
                count = some.stop - some.start
                seen = known[: before + some.stop][None, None]
                q = latent[:, at : at + count].reshape(1, 1, heads * count, width)
                mask = batch.mask(index, some, heads, None, query.device)
                # values as wide as keys: what attention kernels want; the rotary part of the output is dropped
                out = scaled_dot_product_attention(q, seen, seen, attn_mask=mask, scale=scale)
                mixed[:, at : at + count] = out.view(heads, count, width)[..., :rank]
                at += count
            del known, seen  # before the next is read
        values = expansion.out_of_latent(mixed)
        at = 0
        for _, span, rows in part:
            count = rows.stop - rows.start
            output[:, span.first + rows.start : span.first + rows.stop] = values[:, at : at + count]
            at += count


def _parts(spans: list[tuple[int, SequenceSpan]], room: int) -> list[list[tuple[int, SequenceSpan, slice]]]:
    """The spans' rows in groups of at most `room`, cut where need be."""
    parts: list[list[tuple[int, SequenceSpan, slice]]] = [[]]
    left = room
    for index, span in spans:
        start = 0
        while start < span.num_new:
            if left == 0:
                parts.append([])
                left = room
            stop = min(span.num_new, start + left)
            parts[-1].append((index, span, slice(start, stop)))
            left -= stop - start
            start = stop
    return parts


def _expanded(
    query: Tensor,  # [H, T, Dn + Dr]
    context: Tensor,  # [C, R + Dr]
    index: int,
    span: SequenceSpan,
    batch: BatchView,
    expansion: _Expansion,
    scale: float,
    output: Tensor,  # [H, T, Dv]
) -> None:
    """Keys and values of some heads at a time, so that what is expanded stays within LATENT_ELEMENTS."""
    heads, v_dim = query.shape[0], expansion.v_dim
    width = expansion.nope + expansion.rope
    latent, rotary = context[:, : expansion.rank], context[:, expansion.rank :]
    group = max(1, min(heads, LATENT_ELEMENTS // (span.length * (width + max(width, v_dim)))))
    before = span.length - span.num_new
    step = max(1, ATTENTION_SCORES // span.length)
    for first in range(0, heads, group):
        own = slice(first, min(first + group, heads))
        count = own.stop - own.start
        keys = torch.cat([latent @ expansion.keys[own].transpose(1, 2), rotary.expand(count, -1, -1)], dim=-1)
        values = latent @ expansion.values[own].transpose(1, 2)
        if v_dim < width:  # as wide as keys: what attention kernels want
            values = pad(values, (0, width - v_dim))
        for start in range(0, span.num_new, step):
            rows = slice(start, min(start + step, span.num_new))
            packed = slice(span.first + rows.start, span.first + rows.stop)
            seen = before + rows.stop
            mask = batch.mask(index, rows, 1, None, query.device)
            out = scaled_dot_product_attention(
                query[None, own, packed], keys[None, :, :seen], values[None, :, :seen], attn_mask=mask, scale=scale
            )
            output[own, packed] = out[0, ..., :v_dim]
