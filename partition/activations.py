"""What computing takes beside weights and KV: an estimate in bytes."""

from __future__ import annotations

from collections.abc import Sequence

from partition.kv_layout import layers_kv
from partition.plan_data import (
    ATTENTION_BYTES_PER_SCORE,
    ATTENTION_SCORES,
    DTYPE_BYTES,
    HEAD_ROWS,
    LATENT_ELEMENTS,
    ROW_STAGING_BYTES,
    SAMPLING_BYTES,
    SAMPLING_BYTES_PER_LOGIT,
)
from partition.sharding import local_heads
from partition.work import Stage, Work

_EAGER_BYTES_PER_SCORE = 12  # as they come, with the mask added, and their softmax in float32


def activation_bytes(work: Work, stage: Stage, tp_rank: int, micro_batches: int, ring_rows: Sequence[int] = ()) -> int:
    """An estimate: hidden states of a whole step (in and out), the largest intermediates of one micro-batch, attention
    on one layer, the largest encoded matrix (where no kernel computes from the encoded form it is decoded first), on
    the last stage logits and on its tp_rank 0 what drawing takes; and every request's recurrent states.

    ring_rows: of the plan that is made.
    """
    spec, size = work.spec, DTYPE_BYTES[work.options.dtype]
    tokens = work.max_batch_tokens
    decoded = max(unit.decoded_bytes[tp_rank] for unit in stage.units.values())
    hidden = 2 * tokens * micro_batches * spec.hidden_size * size
    intermediate = tokens * (4 * spec.hidden_size + _widest(work, tp_rank)) * size
    rows = ROW_STAGING_BYTES if stage.rows else 0
    states = 4 * work.max_requests * spec.state_elements * (stage.end_layer - stage.first_layer) // spec.num_layers
    own = _library_attention if spec.path != "packed" else _paged_attention
    attention = own(work, stage, tp_rank, ring_rows)
    return states + attention + hidden + intermediate + decoded + _logits(work, stage, tp_rank) + rows


def _widest(work: Work, tp_rank: int) -> int:
    """Elements that a token takes at most between two hidden states: in attention, in an MLP, or in its experts."""
    spec, dims, tensor = work.spec, work.spec.dims, work.options.tensor
    q_heads, kv_heads = local_heads(spec, work.cut, tp_rank)
    attention = 2 * q_heads * spec.head_dim + 2 * kv_heads * (spec.head_dim + spec.v_head_dim)
    if spec.latent_dim:  # no K and V of new tokens
        attention = q_heads * (2 * spec.head_dim + spec.v_head_dim) + 2 * spec.latent_dim
    mlp = 3 * dims.get("inter", 0) // tensor
    experts = dims.get("experts_per_token", 0)
    routed = experts * dims.get("moe_inter", 0) + dims.get("shared_inter", 0)
    return max(attention, mlp, 3 * routed // tensor + experts * spec.hidden_size)


def _paged_attention(work: Work, stage: Stage, tp_rank: int, ring_rows: Sequence[int]) -> int:
    """Scores in bounded slices, the rows of one context where they do not lie together, and what latents expand to."""
    spec, size, tokens = work.spec, DTYPE_BYTES[work.options.dtype], work.max_batch_tokens
    longest = work.options.longest_sequence(spec)
    q_heads, kv_heads = local_heads(spec, work.cut, tp_rank)
    kept = layers_kv(spec, work.cut, tp_rank, ring_rows)[stage.first_layer : stage.end_layer]
    gathered = max(layer.row_elements * (layer.ring_rows or longest) for layer in kept) * size
    latent = 0
    if spec.latent_dim:  # slices that are expanded (context) or absorbed (queries)
        expanded = longest * (spec.head_dim + max(spec.head_dim, spec.v_head_dim))  # of a head
        absorbed = tokens * 2 * spec.latent_dim
        slices = max(expanded, min(LATENT_ELEMENTS, q_heads * max(expanded, absorbed)))
        latent, kv_heads = 3 * slices * size, 1  # as they come, joined and padded
    scores = min(ATTENTION_SCORES, tokens * longest * max(1, q_heads // max(1, kv_heads)))
    return ATTENTION_BYTES_PER_SCORE * scores + gathered + latent


def _library_attention(work: Work, stage: Stage, _tp_rank: int, _ring_rows: Sequence[int]) -> int:
    """One sequence at a time, uncut: its mask, its K and V joined to the new ones and repeated for all query heads, and
    where the class has no other way than "eager" the scores of all heads."""
    spec, size, tokens = work.spec, DTYPE_BYTES[work.options.dtype], work.max_batch_tokens
    kept = max(spec.kv_elements[stage.first_layer : stage.end_layer], default=0)
    if kept == 0:
        return 0
    longest = work.options.longest_sequence(spec)
    repeated = spec.num_heads * (spec.head_dim + spec.v_head_dim)
    scores = spec.num_heads * _EAGER_BYTES_PER_SCORE if spec.family["eager"] else 0
    return longest * ((kept + repeated) * size + tokens * (1 + size + scores))


def _logits(work: Work, stage: Stage, tp_rank: int) -> int:
    """In float32, as they come and joined from the tensor ranks, and what drawing takes; 0 without the head."""
    if "head" not in stage.names:
        return 0
    rows, vocab = max(work.max_requests, HEAD_ROWS), work.spec.vocab_size
    if tp_rank > 0:
        return rows * -(-vocab // work.options.tensor) * 8
    return 3 * rows * vocab * 4 + min(SAMPLING_BYTES_PER_LOGIT * work.max_requests * vocab, SAMPLING_BYTES)
