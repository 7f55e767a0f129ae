"""Latent attention against one written out in float64 over expanded keys and values: both ways to compute it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from dist_infer.messages import Chunk, NewRequest, SamplingSpec, StepPlan
from dist_infer.model import latent_attention
from dist_infer.model.attention import paged_attention
from dist_infer.model.batch_view import use_batch
from dist_infer.model.kv_cache import KVCache
from dist_infer.model.latent_attention import keep_latent
from dist_infer.worker.request_table import RequestTable
from partition.errors import UnsupportedModelError
from partition.kv_layout import LayerKV

CPU = torch.device("cpu")
HEADS, NOPE, ROPE, V_DIM = 3, 8, 4, 6


class Latent(nn.Module):
    """The part of a latent attention module that the adapter changes and attention asks."""

    def __init__(self, rank: int, v_dim: int = V_DIM) -> None:
        super().__init__()
        self.layer_idx = 0
        self.kv_lora_rank, self.v_head_dim = rank, v_dim
        self.qk_nope_head_dim, self.qk_rope_head_dim = NOPE, ROPE
        self.kv_b_proj = nn.Linear(rank, HEADS * (NOPE + v_dim), bias=False)

    def expand_kv(self, latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("was to be replaced")


def plain(module: Latent, query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """query [T, H, D], rows [T, R + Dr] of one whole sequence: [T, H, Dv]."""
    weight = module.kv_b_proj.weight
    by_head = weight.detach().double().view(HEADS, -1, module.kv_lora_rank)
    latent, rotary = rows.double().split([module.kv_lora_rank, ROPE], dim=-1)
    expanded = torch.einsum("hdr,tr->thd", by_head, latent)
    keys = torch.cat([expanded[..., :NOPE], rotary[:, None].expand(-1, HEADS, -1)], dim=-1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    future = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), expanded[..., NOPE:])


def compare(
    module: Latent, lengths: list[int], chunks: list[int], *, seed: int = 0, block: int = 4, tolerance: float = 1e-5
) -> None:
    """Sequences in chunks of these sizes (again and again), all of a step in one packed row, over scattered blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-length // block) for length in lengths]
    pool = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
    width = module.kv_lora_rank + ROPE
    queries = [torch.randn(n, HEADS, NOPE + ROPE, generator=generator) for n in lengths]
    rows = [torch.randn(n, width, generator=generator) for n in lengths]
    kind = LayerKV(num_heads=1, key_dim=width, value_dim=0, latent=True)
    cache = KVCache({0: kind}, len(pool) * block, 0, torch.float32, CPU)
    cache.pools(0)[0].fill_(1e4)  # a row that is read without having been written shows
    table = RequestTable(block, len(pool), CPU)
    new = []
    for i, count in enumerate(blocks):
        new.append(NewRequest(str(i), tuple(range(lengths[i])), tuple(pool[:count]), SamplingSpec()))
        pool = pool[count:]
    found = [torch.zeros(n, HEADS, module.v_head_dim) for n in lengths]
    done, step = [0] * len(lengths), 0
    while done != lengths:
        size = chunks[step % len(chunks)]
        batch = tuple(
            Chunk(str(i), at, min(size, lengths[i] - at), False) for i, at in enumerate(done) if at < lengths[i]
        )
        table.apply(StepPlan(step, (batch,), new=tuple(new) if step == 0 else ()))
        cuts = [(int(c.request_id), slice(c.start, c.start + c.num_tokens)) for c in batch]
        row = torch.cat([rows[i][part] for i, part in cuts])[None, None]
        keys, values = module.expand_kv(row[..., : module.kv_lora_rank], row[..., module.kv_lora_rank :])
        query = torch.cat([queries[i][part] for i, part in cuts]).transpose(0, 1)[None]
        with torch.inference_mode(), use_batch(table.micro_batch(batch).view, cache):
            out, _ = paged_attention(module, query, keys, values, scaling=0.4)
        for (i, part), piece in zip(cuts, out[0].split([part.stop - part.start for _, part in cuts]), strict=True):
            found[i][part] = piece
            done[i] = part.stop
        step += 1
    for i, answer in enumerate(found):
        expected = plain(module, queries[i], rows[i], 0.4)
        torch.testing.assert_close(answer.double(), expected, rtol=tolerance, atol=tolerance)


def module_of(rank: int, seed: int = 0, v_dim: int = V_DIM) -> Latent:
    torch.manual_seed(seed)
    module = Latent(rank, v_dim)
    nn.init.normal_(module.kv_b_proj.weight, std=0.5)
    keep_latent(nn.ModuleList([module]))
    return module


@pytest.fixture(params=["absorbed", "expanded", "cheaper"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "cheaper":
        always = request.param == "expanded"
        monkeypatch.setattr(latent_attention._Expansion, "is_cheaper", lambda *_: always)
    return str(request.param)


@pytest.mark.parametrize("chunks", [[100], [1], [5, 1], [1, 7]], ids=str)
@pytest.mark.parametrize("dims", [(16, 6), (40, 6), (16, 20)], ids=str)
def test_both_ways_equal_expanded_attention(way: str, dims: tuple[int, int], chunks: list[int]) -> None:
    """Values narrower and wider than keys, prefill and decode in one step."""
    compare(module_of(dims[0], v_dim=dims[1]), [19, 2, 8], chunks)


@pytest.mark.parametrize("elements", [1, 60, 400])
def test_slices_of_any_size_give_the_same(way: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expanded or absorbed at a time is bounded: heads, rows and spans are cut where need be."""
    monkeypatch.setattr(latent_attention, "LATENT_ELEMENTS", elements)
    monkeypatch.setattr(latent_attention, "ATTENTION_SCORES", elements)
    compare(module_of(16), [13, 1, 6], [100])
    compare(module_of(16), [13, 9, 6], [4, 1])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rank=st.sampled_from([4, 16, 48]),
    block=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape(lengths: list[int], chunks: list[int], rank: int, block: int, seed: int) -> None:
    compare(module_of(rank, seed), lengths, chunks, seed=seed, block=block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_what_leaves_the_latent_is_the_same_in_both_orders(dtype: torch.dtype, rows: int) -> None:
    """In half precision the weight is multiplied from the left; a transposition forgotten there shows here."""
    module = module_of(16)
    module.kv_b_proj.to(dtype)
    expansion = latent_attention._Expansion(module, HEADS)
    mixed = torch.randn(HEADS, rows, 16, dtype=dtype)
    wanted = torch.einsum("hnr,hvr->hnv", mixed.double(), expansion.values.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(expansion.out_of_latent(mixed).double(), wanted, rtol=tolerance, atol=tolerance)


def test_one_gathered_context_is_in_memory_at_a_time(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sequences of a step decode together: their contexts at once would be the whole cache a second time."""
    given: list[StorageWeakRef] = []
    read = KVCache.read

    def spy(cache: KVCache, layer: int, rows: Any, *rest: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert all(storage.expired() for storage in given)
        keys, values = read(cache, layer, rows, *rest)
        if not isinstance(rows, slice):
            given.append(StorageWeakRef(keys.untyped_storage()))
        return keys, values

    monkeypatch.setattr(KVCache, "read", spy)
    compare(module_of(16), [13, 9, 16], [5, 1])
    assert len(given) > 6


def test_the_cheaper_way_is_chosen_by_multiplications() -> None:
    """DeepSeek-V3: decoding is absorbed at any length, a long chunk is expanded."""
    expansion = latent_attention._Expansion(module_of(16), HEADS)
    expansion.rank, expansion.nope, expansion.rope, expansion.v_dim = 512, 128, 64, 128
    assert not any(expansion.is_cheaper(1, length) for length in (16, 1000, 100_000))
    assert not expansion.is_cheaper(64, 8192)
    assert expansion.is_cheaper(512, 512)
    assert expansion.is_cheaper(512, 100_000)


def test_what_is_not_latent_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no latent attention"):
        keep_latent(nn.Linear(2, 2))
    module = module_of(16)
    cache = KVCache({0: LayerKV(num_heads=1, key_dim=20, value_dim=0, latent=True)}, 4, 0, torch.float32, CPU)
    table = RequestTable(4, 1, CPU)
    table.apply(StepPlan(0, (), new=(NewRequest("a", (1,), (0,), SamplingSpec()),)))
    query = torch.ones(1, HEADS, 1, NOPE + ROPE)
    with use_batch(table.micro_batch((Chunk("a", 0, 1, False),)).view, cache):
        with pytest.raises(RuntimeError, match="where the latent was to come"):
            paged_attention(module, query, torch.ones(1, HEADS, 1, 12), torch.ones(1, HEADS, 1, V_DIM))
        with pytest.raises(RuntimeError, match="with a window"):
            paged_attention(module, query, torch.ones(1, 1, 1, 20), torch.ones(1, 1, 1, 0), sliding_window=4)
