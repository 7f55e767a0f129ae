"""What computing takes beside weights and KV: an estimate in bytes."""

from __future__ import annotations

from partition.kv_budget import DEFAULT_MAX_MODEL_LEN
from partition.plan_data import (
    ATTENTION_BYTES_PER_SCORE,
    ATTENTION_SCORES,
    DTYPE_BYTES,
    LATENT_ELEMENTS,
    ROW_STAGING_BYTES,
    SAMPLING_BYTES,
    SAMPLING_BYTES_PER_LOGIT,
)
from partition.sharding import local_heads
from partition.work import Stage, Work


def activation_bytes(work: Work, stage: Stage, tp_rank: int, micro_batches: int) -> int:
    """An estimate: hidden states of a whole step (in and out), the largest intermediates of one micro-batch (attention
    scores in bounded slices), the largest encoded matrix (where no kernel computes from the encoded form it is decoded
    first), on the last stage logits of every request, and on its tp_rank 0 what drawing takes; and every request's
    recurrent states."""
    decoded = max(unit.decoded_bytes[tp_rank] for unit in stage.units.values())
    spec, dims, size = work.spec, work.spec.dims, DTYPE_BYTES[work.options.dtype]
    tokens = work.max_batch_tokens
    q_heads, kv_heads = local_heads(spec, work.cut, tp_rank)
    attention = 2 * q_heads * spec.head_dim + 2 * kv_heads * (spec.head_dim + spec.v_head_dim)
    longest = work.options.max_model_len or min(spec.max_position, DEFAULT_MAX_MODEL_LEN)
    latent = 0
    if spec.latent_dim:  # no K and V of new tokens, but slices that are expanded (context) or absorbed (queries)
        attention = q_heads * (2 * spec.head_dim + spec.v_head_dim) + 2 * spec.latent_dim
        expanded = longest * (spec.head_dim + max(spec.head_dim, spec.v_head_dim))  # of a head
        absorbed = tokens * 2 * spec.latent_dim
        slices = max(expanded, min(LATENT_ELEMENTS, q_heads * max(expanded, absorbed)))
        latent, kv_heads = 3 * slices * size, 1  # as they come, joined and padded
    mlp = 3 * dims.get("inter", 0) // work.options.tensor
    routed = dims.get("experts_per_token", 0) * dims.get("moe_inter", 0) + dims.get("shared_inter", 0)
    widest = max(
        attention, mlp, 3 * routed // work.options.tensor + dims.get("experts_per_token", 0) * spec.hidden_size
    )
    logits = 0
    if "head" in stage.names:  # in float32, as they come and joined from the tensor ranks, and what drawing takes
        drawing = min(SAMPLING_BYTES_PER_LOGIT * work.max_requests * spec.vocab_size, SAMPLING_BYTES)
        logits = (
            3 * work.max_requests * spec.vocab_size * 4 + drawing
            if tp_rank == 0
            else work.max_requests * (-(-spec.vocab_size // work.options.tensor) * 8)
        )
    scores = min(ATTENTION_SCORES, tokens * longest * max(1, q_heads // max(1, kv_heads)))
    hidden = 2 * tokens * micro_batches * spec.hidden_size * size
    intermediate = tokens * (4 * spec.hidden_size + widest) * size
    rows = ROW_STAGING_BYTES if stage.rows else 0
    states = 4 * work.max_requests * spec.state_elements * (stage.end_layer - stage.first_layer) // spec.num_layers
    return states + ATTENTION_BYTES_PER_SCORE * scores + latent + hidden + intermediate + decoded + logits + rows
