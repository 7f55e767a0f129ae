"""Paged attention against a plain one written out in float64: every mask, layout and head grouping that it folds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from dist_infer.messages import Chunk, NewRequest, RequestDiff, SamplingSpec, StepPlan
from dist_infer.model import attention
from dist_infer.model.attention import paged_attention
from dist_infer.model.batch_view import BatchView, SequenceSpan, use_batch
from dist_infer.model.kv_cache import KVCache
from dist_infer.worker.request_table import RequestTable
from partition.kv_layout import LayerKV

CPU = torch.device("cpu")
LAYER = SimpleNamespace(layer_idx=3, sliding_window=2)  # the attribute lies: only the keyword counts


def heads_of(num_heads: int, key_dim: int, value_dim: int, window: int | None = None, ring_rows: int = 0) -> LayerKV:
    return LayerKV(num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, window=window, ring_rows=ring_rows)


def cache_of(
    kind: LayerKV, num_rows: int, *layers: int, num_slots: int = 0, dtype: torch.dtype = torch.float32
) -> KVCache:
    return KVCache(dict.fromkeys(layers, kind), num_rows, num_slots, dtype, CPU)


def plain(
    query: torch.Tensor,  # [T, Hq, D]
    key: torch.Tensor,  # [T, Hk, D]
    value: torch.Tensor,  # [T, Hk, Dv]
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One whole sequence, causal: [T, Hq, Dv]."""
    query, key, value = query.double(), key.double(), value.double()
    rep = query.shape[1] // key.shape[1]
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64)
    for t in range(query.shape[0]):
        first = 0 if window is None else max(0, t - window + 1)
        for head in range(query.shape[1]):
            scores = key[first : t + 1, head // rep] @ query[t, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            rest = 0.0 if sinks is None else sinks[head].double().exp()
            out[t, head] = (weights / (weights.sum() + rest)) @ value[first : t + 1, head // rep]
    return out


def compare(
    lengths: list[int],
    chunks: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    block: int = 4,
    window: int | None = None,
    softcap: float | None = None,
    with_sinks: bool = False,
    scaling: float | None = None,
    scattered: bool = False,
    in_rings: bool = False,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Sequences of `lengths`, computed in chunks of these sizes (again and again), all of a step in one packed row.

    in_rings: rows in rings as small as the planner makes them. Returns what was found, [length, Hq, Dv] each.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    num_heads, num_kv_heads = heads
    blocks_each = [-(-length // block) for length in lengths]
    pool = list(range(sum(blocks_each) + 2))
    if scattered:
        pool = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()]
    slots = len(lengths) if in_rings else 0
    table = RequestTable(block, len(pool), CPU, slots)
    rows = (window or 0) + max(min(size, max(lengths)) for size in chunks) if in_rings else 0
    kind = heads_of(num_kv_heads, *dims, window if in_rings else None, rows)
    cache = cache_of(kind, len(pool) * block, 2, 3, num_slots=slots)
    for stored in cache.pools(3):
        stored.fill_(1e4)  # a row that is read without having been written shows
    sequences = [
        (normal(n, num_heads, dims[0]), normal(n, num_kv_heads, dims[0]), normal(n, num_kv_heads, dims[1]))
        for n in lengths
    ]
    sinks = normal(num_heads) if with_sinks else None
    scale = dims[0] ** -0.5 if scaling is None else scaling
    new = []
    for i, length in enumerate(lengths):
        new.append(NewRequest(str(i), tuple(range(length)), tuple(pool[: blocks_each[i]]), SamplingSpec()))
        pool = pool[blocks_each[i] :]
    found = [torch.zeros(n, num_heads, dims[1]) for n in lengths]
    done, step = [0] * len(lengths), 0
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        size = chunks[step % len(chunks)]
        batch = tuple(
            Chunk(str(i), at, min(size, length - at), False)
            for i, (at, length) in enumerate(zip(done, lengths, strict=True))
            if at < length
        )
        plan = StepPlan(
            step, (batch,), new=tuple(new) if step == 0 else (), diffs=(RequestDiff("0", (), ()),) if step else ()
        )
        table.apply(plan)
        view = table.micro_batch(batch).view
        parts = [sequences[int(c.request_id)] for c in batch]
        packed = [
            torch.cat([part[k][c.start : c.start + c.num_tokens] for part, c in zip(parts, batch, strict=True)])
            for k in range(3)
        ]
        with use_batch(view, cache):
            out, weights = paged_attention(
                LAYER,
                *(tensor.transpose(0, 1)[None] for tensor in packed),
                attention_mask=None,
                scaling=scaling,
                sliding_window=window,
                softcap=softcap,
                s_aux=sinks,
                is_causal=True,
            )
        assert weights is None
        assert out.shape == (1, sum(c.num_tokens for c in batch), num_heads, dims[1])
        row = 0
        for c in batch:
            found[int(c.request_id)][c.start : c.start + c.num_tokens] = out[0, row : row + c.num_tokens]
            done[int(c.request_id)] += c.num_tokens
            row += c.num_tokens
        step += 1
    for sequence, rows in zip(sequences, found, strict=True):
        torch.testing.assert_close(rows.double(), plain(*sequence, scale, window, softcap, sinks), rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("scattered", [False, True], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("chunks", [[100], [1], [3, 1], [1, 4]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"window": 1},
        {"softcap": 0.7},
        {"with_sinks": True},
        {"window": 4, "softcap": 2.0, "with_sinks": True},
        {"heads": (6, 1)},
        {"heads": (3, 3), "window": 2, "with_sinks": True},
        {"dims": (8, 5)},
        {"scaling": 0.3},
    ],
    ids=str,
)
def test_equals_plain_attention(options: dict[str, Any], chunks: list[int], scattered: bool) -> None:
    """Ragged batches of prefill chunks and single tokens together, across block borders."""
    compare([9, 2, 5], chunks, scattered=scattered, **options)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    chunks=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    rep=st.integers(1, 3),
    block=st.integers(1, 5),
    window=st.none() | st.integers(1, 13),
    softcap=st.none() | st.floats(0.5, 5),
    with_sinks=st.booleans(),
    scattered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_plain_attention_for_any_shape(
    groups: int, rep: int, lengths: list[int], chunks: list[int], **options: Any
) -> None:
    compare(lengths, chunks, heads=(groups * rep, groups), **options)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0, "with_sinks": True}], ids=str)
def test_long_prompts_are_attended_in_slices(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of one call are bounded (MAX_SCORES), whatever the chunk; each slice sees its own past only."""
    monkeypatch.setattr("dist_infer.model.attention.MAX_SCORES", 30)
    compare([11, 6], [7, 3], scattered=True, **options)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"with_sinks": True}], ids=str)
def test_scores_that_are_written_out_are_bounded_for_all_heads_together(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel keeps them in registers: of all heads they lie in memory, so a slice is as much shorter."""
    sizes = []
    explicit = attention._explicit_attention

    def spy(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        if q.shape[2] > rest[-1]:  # more than one row of the chunk
            sizes.append(q.shape[1] * q.shape[2] * k.shape[2])
        return explicit(q, k, *rest)

    monkeypatch.setattr(attention, "_explicit_attention", spy)
    monkeypatch.setattr(attention, "MAX_SCORES", 300)
    compare([21, 6], [14, 3], heads=(6, 3), scattered=True, **options)
    assert max(sizes) <= 300


@pytest.mark.parametrize("in_rings", [False, True])
def test_one_copied_context_is_in_memory_at_a_time(in_rings: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts one copy; the next sequence's must not be made before it is gone."""
    given: list[StorageWeakRef] = []
    read = KVCache.read

    def spy(cache: KVCache, layer: int, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert all(storage.expired() for storage in given)
        found = read(cache, layer, *rest)
        pools = {pool.untyped_storage().data_ptr() for pool in cache.pools(layer)}
        given.extend(
            StorageWeakRef(part.untyped_storage()) for part in found if part.untyped_storage().data_ptr() not in pools
        )
        return found

    monkeypatch.setattr(KVCache, "read", spy)
    compare([21, 26, 17], [5, 1], window=3, scattered=True, in_rings=in_rings)
    assert len(given) > 6


@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}, {"with_sinks": True}, {"dims": (8, 5)}], ids=str)
@pytest.mark.parametrize("chunks", [[100], [1], [3, 1], [5, 4, 1]], ids=str)
@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_ring_gives_the_bits_of_paged_rows(window: int, chunks: list[int], options: dict[str, Any]) -> None:
    """Contexts of several windows, so that every row is overwritten, at chunk borders that wrap in the middle."""
    lengths = [31, 2, 17]
    ring = compare(lengths, chunks, window=window, in_rings=True, **options)
    paged = compare(lengths, chunks, window=window, scattered=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(ring, paged, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    window=st.integers(1, 13),
    seed=st.integers(0, 1000),
)
def test_rings_of_any_shape(lengths: list[int], chunks: list[int], window: int, seed: int) -> None:
    compare(lengths, chunks, window=window, in_rings=True, seed=seed)


@pytest.mark.parametrize("asked", [None, 4])
def test_a_call_that_looks_further_back_than_the_ring_is_an_error(asked: int | None) -> None:
    """Other positions' rows would be read in place of those that are gone: a wrong number without a word."""
    cache = cache_of(heads_of(1, 2, 2, window=3, ring_rows=5), 0, 3, num_slots=1)
    view = BatchView(torch.tensor([0]), (SequenceSpan(0, 1, 1, slice(0, 1)),), torch.tensor([[0], [0]]))
    ones = torch.ones(1, 1, 1, 2)
    with use_batch(view, cache):
        paged_attention(LAYER, ones, ones, ones, sliding_window=3)
        with pytest.raises(RuntimeError, match="keeps the last 3 positions, but the model class attends to"):
            paged_attention(LAYER, ones, ones, ones, sliding_window=asked)


def test_rows_and_rings_are_copied_where_they_are_kept() -> None:
    """A request that goes on from another's prompt needs both; the copy goes to all layers of its kind only."""
    kinds = {0: heads_of(1, 2, 3), 1: heads_of(1, 2, 3, window=2, ring_rows=3)}
    cache = KVCache(kinds, 8, 2, torch.float32, CPU)
    for layer in kinds:
        for pool in cache.pools(layer):
            pool.copy_(torch.arange(pool.shape[0])[:, None, None].expand_as(pool))
    cache.copy_rows(slice(0, 2), torch.tensor([6, 4]))
    cache.copy_slot(1, 0)
    for pool in cache.pools(0):
        assert pool[:, 0, 0].tolist() == [0, 1, 2, 3, 1, 5, 0, 7]
    for pool in cache.pools(1):
        assert pool[:, 0, 0].tolist() == [3, 4, 5, 3, 4, 5]


def test_rows_of_other_sequences_are_left_alone() -> None:
    cache = cache_of(heads_of(1, 2, 2), 8, 3)
    view = BatchView(torch.tensor([5]), (SequenceSpan(0, 1, 1, slice(5, 6)),))
    ones = torch.ones(1, 1, 1, 2)
    with use_batch(view, cache):
        paged_attention(LAYER, ones, ones, ones)
    for pool in cache.pools(3):
        assert pool[:, 0, 0].nonzero().flatten().tolist() == [5]


def test_layers_have_pools_of_their_own_and_unused_ones_are_known() -> None:
    """A layer that never came here was computed by somebody else's attention, without our cache."""
    cache = cache_of(heads_of(1, 2, 3), 4, 2, 3, 4, dtype=torch.bfloat16)
    assert cache.num_bytes == 3 * 4 * 1 * (2 + 3) * 2
    cache.pools(3)[0].fill_(1)
    assert cache.untouched() == [2, 4]
    assert float(cache.pools(2)[0].sum() + cache.pools(4)[0].sum()) == 0
    assert cache.untouched() == []


def test_outside_of_a_step_it_refuses_and_a_step_ends_with_an_error_too() -> None:
    ones = torch.ones(1, 1, 1, 2)
    cache = cache_of(heads_of(1, 2, 2), 4, 3)
    with pytest.raises(ZeroDivisionError), use_batch(BatchView(torch.tensor([0]), ()), cache):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="outside of a step"):
        paged_attention(LAYER, ones, ones, ones)
