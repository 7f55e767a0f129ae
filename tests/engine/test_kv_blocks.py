"""Blocks are conserved, owned once, and come in runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_infer.engine.kv_blocks import KVBlockManager


def test_lowest_run_that_fits_comes_first() -> None:
    blocks = KVBlockManager(num_blocks=10, block_tokens=4)
    assert blocks.allocate("a", 2) == [0, 1]
    assert blocks.allocate("b", 3) == [2, 3, 4]
    blocks.free("a")
    assert blocks.allocate("c", 3) == [5, 6, 7]  # not 0, 1 and a piece elsewhere
    assert blocks.allocate("d", 2) == [0, 1]


def test_growth_goes_on_where_the_owner_ended() -> None:
    blocks = KVBlockManager(num_blocks=10, block_tokens=4)
    blocks.allocate("a", 2)
    blocks.allocate("b", 2)
    blocks.free("a")
    assert blocks.allocate("b", 1) == [4]  # block 0 is free and lower


def test_split_only_when_no_run_fits() -> None:
    blocks = KVBlockManager(num_blocks=7, block_tokens=4)
    for owner in "abcdefg":
        blocks.allocate(owner, 1)
    for owner in "acde":
        blocks.free(owner)
    assert blocks.allocate("long", 4) == [2, 3, 4, 0]
    blocks.integrity()


def test_question_and_deed_agree() -> None:
    blocks = KVBlockManager(num_blocks=2, block_tokens=4)
    assert blocks.can_allocate(2)
    assert not blocks.can_allocate(3)
    with pytest.raises(RuntimeError, match="ask can_allocate"):
        blocks.allocate("a", 3)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert KVBlockManager(num_blocks=9, block_tokens=4).blocks_for(num_tokens) == num_blocks


def test_integrity_sees_a_block_owned_twice_and_a_lost_one() -> None:
    blocks = KVBlockManager(num_blocks=3, block_tokens=4)
    blocks.allocate("a", 1)
    blocks._owned["b"] = [0]
    with pytest.raises(RuntimeError, match="KV blocks"):
        blocks.integrity()
    blocks._owned.clear()
    with pytest.raises(RuntimeError, match="KV blocks"):
        blocks.integrity()


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 6)), max_size=60))
def test_any_order_of_allocations_conserves_blocks(calls: list[tuple[str, int]]) -> None:
    """0 frees; a run that is not merged again or merged wrongly shows as a lost or doubled block."""
    blocks = KVBlockManager(num_blocks=16, block_tokens=1)
    for owner, count in calls:
        if count == 0:
            blocks.free(owner)
        elif blocks.can_allocate(count):
            assert len(blocks.allocate(owner, count)) == count
        blocks.integrity()
        assert blocks.num_free + sum(map(len, blocks.owners().values())) == 16
    for owner in "abcdef":
        blocks.free(owner)
    assert blocks.allocate("all", 16) == list(range(16))
