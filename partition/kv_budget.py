"""How much of each memory the KV cache takes, and so how long sequences may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from partition.errors import BudgetError
from partition.model_spec import ModelSpec
from partition.plan_data import PlanOptions
from partition.sizes import format_size

DEFAULT_MAX_MODEL_LEN = 8192
EXPECTED_LEN = 2048  # tokens that a request is expected to hold, when memory for KV is chosen and not given
_SHORTEST_AUTO_LEN = 512
_KV_PER_CENT_WHEN_STREAMING = 25


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One memory that holds weights and KV together: a node's on cpu, a device's on cuda. All in bytes.

    `least_weight_bytes`: what streaming through the shortest ring takes at least. `pinned_weight_bytes`: embedding and
    head kept, the layers streamed so. `block_bytes`: one KV block on all of the pool's ranks, `largest_block_bytes` on
    the rank where it is largest.
    """

    name: str
    key: str
    budget_bytes: int
    activation_bytes: int
    weight_bytes: int
    least_weight_bytes: int
    pinned_weight_bytes: int
    block_bytes: int
    largest_block_bytes: int


@dataclass(frozen=True, kw_only=True)
class KvDecision:
    """`num_blocks` on every rank. `expected_len`: tokens a request is counted with in predictions."""

    num_blocks: int
    max_model_len: int
    expected_len: int


def decide_kv(pools: Sequence[Pool], spec: ModelSpec, options: PlanOptions, *, max_requests: int) -> KvDecision:
    """The same number of blocks everywhere: what the tightest pool allows.

    With engine.kv_memory: that much on each rank. Without: enough for `max_requests` expected lengths, but at most a
    quarter of the budget when weights must be streamed. engine.max_model_len, where not given, shrinks to what fits.
    Raises BudgetError when not one sequence of engine.max_model_len fits.
    """
    asked = options.max_model_len
    max_model_len = asked or min(spec.max_position, DEFAULT_MAX_MODEL_LEN)
    one = _blocks(max_model_len if asked else min(max_model_len, _SHORTEST_AUTO_LEN), options)
    for pool in pools:
        left = pool.budget_bytes - pool.activation_bytes - pool.least_weight_bytes
        if left < 0:
            raise BudgetError(
                f"{pool.name} may use {format_size(pool.budget_bytes)}, but needs at least "
                f"{format_size(pool.least_weight_bytes)} for a ring of the largest units and "
                f"{format_size(pool.activation_bytes)} for activations: raise {pool.key}, lower "
                f"engine.max_batch_tokens or engine.max_requests, or use more ranks (parallel.tensor or .pipeline)"
            )
    if options.kv_memory is not None:
        num_blocks = min(options.kv_memory // pool.largest_block_bytes for pool in pools)
    else:
        wanted = max(one, max_requests * _blocks(min(max_model_len, EXPECTED_LEN), options))
        num_blocks = min(_auto_blocks(pool, one=one, wanted=wanted) for pool in pools)
    if asked is None:
        max_model_len = min(max_model_len, num_blocks * options.block_tokens)
        one = min(one, max(1, num_blocks))
    if num_blocks < one or max_model_len < 2:
        _refuse(pools, options, one=max(1, one))
    for pool in pools:
        left = pool.budget_bytes - pool.activation_bytes - pool.least_weight_bytes
        if num_blocks * pool.block_bytes > left:
            raise BudgetError(
                f"engine.kv_memory {format_size(options.kv_memory or 0)} a rank takes "
                f"{format_size(num_blocks * pool.block_bytes)} of {pool.name}, where "
                f"{format_size(max(0, left))} of {format_size(pool.budget_bytes)} are left beside the weights' "
                f"ring and activations: lower engine.kv_memory or raise {pool.key}"
            )
    return KvDecision(num_blocks=num_blocks, max_model_len=max_model_len, expected_len=min(max_model_len, EXPECTED_LEN))


def _blocks(num_tokens: int, options: PlanOptions) -> int:
    return math.ceil(num_tokens / options.block_tokens)


def _auto_blocks(pool: Pool, *, one: int, wanted: int) -> int:
    most = pool.budget_bytes - pool.activation_bytes - pool.least_weight_bytes
    beside_all = pool.budget_bytes - pool.activation_bytes - pool.weight_bytes
    # near full residency the last streamed bytes cost most, so KV yields to them down to a quarter of its wish
    if beside_all >= max(one, wanted // 4) * pool.block_bytes:
        return min(wanted, beside_all // pool.block_bytes)
    quarter = pool.budget_bytes * _KV_PER_CENT_WHEN_STREAMING // 100
    blocks = min(wanted, max(one, quarter // pool.block_bytes), most // pool.block_bytes)
    # embedding and head are the largest units: read in every pass they cost more than the last KV blocks bring
    beside_pinned = (pool.budget_bytes - pool.activation_bytes - pool.pinned_weight_bytes) // pool.block_bytes
    return min(blocks, beside_pinned) if beside_pinned >= max(one, blocks // 4) else blocks


def _refuse(pools: Sequence[Pool], options: PlanOptions, *, one: int) -> None:
    tokens = one * options.block_tokens
    if options.kv_memory is not None:
        need = max(one * pool.largest_block_bytes for pool in pools)
        raise BudgetError(
            f"one sequence of {tokens} tokens needs {format_size(need)} of KV cache a rank, engine.kv_memory is "
            f"{format_size(options.kv_memory)}: raise engine.kv_memory or lower engine.max_model_len"
        )
    pool = min(pools, key=lambda p: (p.budget_bytes - p.activation_bytes - p.least_weight_bytes) // p.block_bytes)
    left = pool.budget_bytes - pool.activation_bytes - pool.least_weight_bytes
    raise BudgetError(
        f"one sequence of {tokens} tokens needs {format_size(one * pool.block_bytes)} of KV cache on {pool.name}, "
        f"where {format_size(left)} of {format_size(pool.budget_bytes)} are left beside the weights' ring and "
        f"activations: raise {pool.key} or lower engine.max_model_len"
    )
