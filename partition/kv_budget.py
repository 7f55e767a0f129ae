"""How much memory the KV cache takes from the weights, and so how long sequences may be.

Both live in one budget. More blocks let more requests share a pass over the weights; less memory for weights makes a
pass longer. Far from full residency the batch wins, close to it the weights do: every choice is predicted, the fastest
is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from partition.errors import BudgetError
from partition.kv_layout import kv_bytes_per_token
from partition.model_spec import ModelSpec
from partition.plan_data import KvChoice, Plan, PlanOptions
from partition.sizes import format_size

EXPECTED_LEN = 2048  # tokens that a request is expected to hold, when memory for KV is chosen and not given
_SHORTEST_AUTO_LEN = 512
_STEP = 1.25  # from one candidate to the next
TIE = 0.99  # of the best: as fast, and then longer sequences are worth more

Trial = Callable[[int, int], KvChoice | None]
"""(blocks, batch) to what that would give; None when the weights then do not fit."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One memory that holds weights and KV together: a node's on cpu, a device's on cuda. All in bytes.

    `least_weight_bytes`: what streaming through the shortest ring takes at least. `pinned_weight_bytes`: embedding and
    head kept, the layers streamed so. `block_bytes`: one KV block on all of the pool's ranks, `largest_block_bytes` on
    the rank where it is largest; 0 where all layers keep rings. `ring_bytes` and `largest_ring_bytes`: the rings of
    max_requests requests.
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
    ring_bytes: int = 0
    largest_ring_bytes: int = 0

    @property
    def left_bytes(self) -> int:
        """For KV blocks, with no more weights in memory than must be."""
        return self.bytes_beside(self.least_weight_bytes)

    def bytes_beside(self, weight_bytes: int) -> int:
        """Bytes for KV blocks beside so many of weights; may be negative."""
        return self.budget_bytes - self.activation_bytes - self.ring_bytes - weight_bytes


@dataclass(frozen=True, kw_only=True)
class KvDecision:
    """`num_blocks` on every rank. `batch`: requests that predictions count with. `choices`: what was weighed."""

    num_blocks: int
    max_model_len: int
    batch: int
    choices: tuple[KvChoice, ...]


def decide_kv(
    pools: Sequence[Pool], spec: ModelSpec, options: PlanOptions, *, max_requests: int, trial: Trial
) -> KvDecision:
    """The same number of blocks everywhere: at most what the tightest pool allows.

    With engine.kv_memory: that much on each rank. Without: from one expected request to `max_requests` of them, what
    decodes fastest. engine.max_model_len, where not given, shrinks to what fits.
    The rings of windowed layers are there for `max_requests` whatever the number of blocks; where every layer keeps
    one, blocks weigh nothing. Raises BudgetError when not one sequence of engine.max_model_len fits.
    """
    asked = options.max_model_len
    longest = options.longest_sequence(spec)
    one = _blocks(longest if asked else min(longest, _SHORTEST_AUTO_LEN), options)
    for pool in pools:
        if pool.left_bytes < 0:
            raise BudgetError(
                f"{pool.name} may use {format_size(pool.budget_bytes)}, but needs at least "
                f"{format_size(pool.least_weight_bytes)} for a ring of the largest units and "
                f"{format_size(pool.activation_bytes + pool.ring_bytes)} for activations"
                f"{' and the KV of windowed layers' if pool.ring_bytes else ''}: raise {pool.key}, lower "
                f"engine.max_batch_tokens, engine.max_requests or engine.max_model_len, or use more ranks "
                f"(parallel.tensor or .pipeline)"
            )
    plenty = max_requests * _blocks(longest, options)
    if options.kv_memory is not None:
        rests = [(options.kv_memory - pool.largest_ring_bytes, pool.largest_block_bytes) for pool in pools]
        candidates = [_fewest(rests, plenty)]
    elif not any(pool.block_bytes for pool in pools):
        candidates = [_fewest([(pool.left_bytes, 0) for pool in pools], plenty)]
    else:
        expected = _blocks(min(longest, EXPECTED_LEN), options)
        candidates = _candidates(pools, one=one, expected=expected, max_requests=max_requests)
    most = max(candidates)
    if asked is None:
        one = min(one, max(1, most))
    if most < one or most * options.block_tokens < 2:
        _refuse(pools, options, one=max(1, one))
    for pool in pools:
        if most * pool.block_bytes > pool.left_bytes:
            raise BudgetError(
                f"engine.kv_memory {format_size(options.kv_memory or 0)} a rank takes "
                f"{format_size(most * pool.block_bytes)} of {pool.name}, where "
                f"{format_size(pool.left_bytes)} of {format_size(pool.budget_bytes)} are left beside the weights' "
                f"ring and activations: lower engine.kv_memory or raise {pool.key}"
            )
    found = [
        choice for blocks in candidates if (choice := trial(blocks, _batch(blocks, longest, options, max_requests)))
    ]
    num_blocks = candidates[0]
    if found:
        enough = TIE * max(choice.tokens_per_s for choice in found)
        num_blocks = max(choice.num_blocks for choice in found if choice.tokens_per_s >= enough)
    return KvDecision(
        num_blocks=num_blocks,
        max_model_len=longest if asked else min(longest, num_blocks * options.block_tokens),
        batch=_batch(num_blocks, longest, options, max_requests),
        choices=tuple(replace(choice, chosen=choice.num_blocks == num_blocks) for choice in found),
    )


def describe_kv(plan: Plan) -> str:
    """Why the plan's KV cache is as large as it is, in a line for people."""
    chosen = next((choice for choice in plan.kv_choices if choice.chosen), None)
    each = f"{kv_bytes_per_token(plan.model, plan.dtype, tensor=plan.tensor):,} bytes per token{_kept_as(plan)}"
    if chosen is None:
        return f"KV {format_size(sum(rank.kv_bytes for rank in plan.ranks))}, {each}"
    text = (
        f"KV {format_size(chosen.kv_bytes)} for {chosen.batch} request{'s' * (chosen.batch != 1)} at a time beside "
        f"{format_size(chosen.resident_bytes)} of resident weights: {chosen.tokens_per_s:.3g} tok/s; {each}"
    )
    others = [choice for choice in plan.kv_choices if not choice.chosen]
    for name, share in (("half", 0.5), ("twice", 2.0)):
        near = [choice for choice in others if 0.8 * share <= choice.num_blocks / chosen.num_blocks <= 1.25 * share]
        if near:
            best = min(near, key=lambda choice: abs(math.log(choice.num_blocks / chosen.num_blocks / share)))
            text += f"; with about {name} of it {best.tokens_per_s:.3g}"
    return text


def _kept_as(plan: Plan) -> str:
    """How it is that a token takes so little, in words."""
    words = ["latent attention"] if plan.model.latent_dim else []
    rings = [rows for rows in plan.ring_rows if rows]
    if rings:
        past = kv_bytes_per_token(plan.model, plan.dtype, tensor=plan.tensor, within_window=False)
        words.append(f"{past:,} past the window: {len(rings)} of {plan.model.num_layers} layers keep {max(rings)} rows")
    return f" ({', '.join(words)})" if words else ""


def _candidates(pools: Sequence[Pool], *, one: int, expected: int, max_requests: int) -> list[int]:
    """Numbers of blocks worth a try, fewest first.

    None is below an expected request, unless that does not fit: speed is not bought with sequences too short to use.
    """
    wanted = max(one, max_requests * expected)
    top = min(wanted, _fewest([(pool.left_bytes, pool.block_bytes) for pool in pools], wanted))
    least = max(one, expected)
    if top <= least:
        return [top]
    found = {least, top}
    # where the last streamed weights, or the ends that would be read in every pass, just stay
    for stays in ([pool.weight_bytes for pool in pools], [pool.pinned_weight_bytes for pool in pools]):
        beside = [
            _fewest([(pool.bytes_beside(weights), pool.block_bytes)], top)
            for pool, weights in zip(pools, stays, strict=True)
        ]
        found |= {blocks for blocks in (min(beside), max(beside)) if least < blocks < top}
    size = float(least)
    while (size := size * _STEP) < top:
        found.add(min(top, math.ceil(size / expected) * expected))
    return sorted(found)


def _fewest(rests: Sequence[tuple[int, int]], plenty: int) -> int:
    """Blocks that all (bytes left, bytes of a block) have room for; `plenty` where blocks weigh nothing."""
    return min(left // size if size else (plenty if left >= 0 else -1) for left, size in rests)


def _batch(num_blocks: int, longest: int, options: PlanOptions, max_requests: int) -> int:
    """Requests of the expected length that the blocks hold at a time."""
    expected = min(longest, EXPECTED_LEN, max(1, num_blocks) * options.block_tokens)
    return max(1, min(max_requests, num_blocks // _blocks(expected, options)))


def _blocks(num_tokens: int, options: PlanOptions) -> int:
    return math.ceil(num_tokens / options.block_tokens)


def _refuse(pools: Sequence[Pool], options: PlanOptions, *, one: int) -> None:
    tokens = one * options.block_tokens
    if options.kv_memory is not None:
        need = max(one * pool.largest_block_bytes for pool in pools)
        raise BudgetError(
            f"one sequence of {tokens} tokens needs {format_size(need)} of KV cache a rank, engine.kv_memory is "
            f"{format_size(options.kv_memory)}: raise engine.kv_memory or lower engine.max_model_len"
        )
    pool = min(pools, key=lambda pool: pool.left_bytes // max(1, pool.block_bytes))
    raise BudgetError(
        f"one sequence of {tokens} tokens needs {format_size(one * pool.block_bytes)} of KV cache on {pool.name}, "
        f"where {format_size(pool.left_bytes)} of {format_size(pool.budget_bytes)} are left beside the weights' ring "
        f"and activations: raise {pool.key} or lower engine.max_model_len"
    )
