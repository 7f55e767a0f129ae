"""Attention over the KV cache, registered with transformers as an attention implementation.

Not here: block allocation (engine), the rows themselves (kv_cache), the weights (streamer), the maths of latent
attention (latent_attention).

Shapes: T tokens of the packed row, Hq/Hk local query/KV heads, D head dim, C context length, N new tokens of one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dist_infer.model.batch_view import active_batch
from dist_infer.model.latent_attention import latent_attention
from partition.kv_layout import LayerKV
from partition.plan_data import ATTENTION_SCORES

NAME = "dist_infer_paged"
MAX_SCORES = ATTENTION_SCORES  # of one call, query rows × keys: what masks and explicit scores may take


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What a model class asks of attention; `arguments`: names of keywords that were given something."""

    layer: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None
    arguments: frozenset[str]


class _Recording(threading.local):
    calls: list[AttentionCall] | None = None


_recording = _Recording()


@contextmanager
def recorded_calls() -> Iterator[list[AttentionCall]]:
    """Within it attention computes nothing, and what it is asked on this thread is noted (meta tensors will do)."""
    calls: list[AttentionCall] = []
    _recording.calls = calls
    try:
        yield calls
    finally:
        _recording.calls = None


def _record(
    calls: list[AttentionCall],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keywords: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    calls.append(
        AttentionCall(
            layer=getattr(module, "layer_idx", None),
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=key.shape[-1],
            v_head_dim=value.shape[-1],
            window=keywords["sliding_window"],
            arguments=frozenset(name for name, given in keywords.items() if given is not None),
        )
    )
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


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
    **other: Any,  # transformers passes what it likes; what changes the numbers is named above
) -> tuple[torch.Tensor, None]:
    """Write the new K/V rows, attend per sequence; returns ([1, T, Hq, Dv], None) as the interface wants it.

    The window is taken from the keyword alone, even when it is None: the module attribute lies for some families.
    """
    if _recording.calls is not None:
        named = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return _record(_recording.calls, module, query, key, value, named | other)
    batch, cache = active_batch()
    layer = module.layer_idx
    kind = cache.kind(layer)
    _check_window(layer, kind, sliding_window)
    if kind.latent:
        if sliding_window is not None or softcap is not None or s_aux is not None:
            raise RuntimeError(f"layer {layer}: latent attention with a window, a softcap or sinks is not known here")
        return latent_attention(module, query, key, scaling, batch, cache), None
    rows_written = batch.write_rows(kind.ring_rows)
    for pool, new in zip(cache.pools(layer), (key, value), strict=True):
        pool[rows_written] = new[0].transpose(0, 1)
    num_query_heads, num_kv_heads = query.shape[1], key.shape[1]
    rep = num_query_heads // num_kv_heads
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    outputs = []
    keys = values = None
    for index, span in enumerate(batch.spans):
        before = span.length - span.num_new
        oldest = span.first_key(sliding_window)
        del keys, values  # one context at a time: it may be a copy
        keys, values = cache.read(layer, span.positions, span.slot, oldest, span.length)
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        at_once = rep if softcap is None and s_aux is None else num_query_heads  # heads whose scores lie in memory
        step = max(1, MAX_SCORES // (at_once * (span.length - oldest)))
        for start in range(0, span.num_new, step):
            rows = slice(start, min(start + step, span.num_new))
            # Query heads of one KV group are folded into the rows, so that K and V are never repeated.
            q = query[0, :, span.first + rows.start : span.first + rows.stop]
            q = q.reshape(1, num_kv_heads, rep * q.shape[1], q.shape[-1])
            mask = batch.mask(index, rows, rep, sliding_window, query.device)
            seen = slice(span.first_key(sliding_window, rows.start) - oldest, before + rows.stop - oldest)
            k, v = keys[:, :, seen], values[:, :, seen]
            if softcap is None and s_aux is None:
                out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            else:
                out = _explicit_attention(q, k, v, mask, scale, softcap, s_aux, rep)
            del k, v
            outputs.append(out.reshape(num_query_heads, rows.stop - rows.start, value.shape[-1]))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return joined.transpose(0, 1).contiguous()[None], None  # some classes take a view of it


def _check_window(layer: int, kind: LayerKV, window: int | None) -> None:
    """A ring forgets what is past its window: a call that looks further back would get other positions' rows."""
    if kind.window is not None and (window is None or window > kind.window):
        raise RuntimeError(
            f"layer {layer} keeps the last {kind.window} positions, but the model class attends to "
            f"{'all' if window is None else window}: partition/windows.py does not describe this model"
        )


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
