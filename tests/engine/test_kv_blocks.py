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


def test_a_shared_block_is_free_when_its_last_owner_is_gone() -> None:
    blocks = KVBlockManager(num_blocks=6, block_tokens=4)
    blocks.allocate("a", 3)
    assert blocks.share("b", "a", 2) == [0, 1]
    assert blocks.share("c", "b", 2) == [0, 1]  # of a sharer, too
    assert blocks.allocate("b", 1) == [3]
    assert blocks.num_free == 2
    for owner, num_free in [("a", 3), ("c", 3), ("b", 6)]:
        blocks.free(owner)
        blocks.integrity()
        assert blocks.num_free == num_free
    assert blocks.allocate("all", 6) == list(range(6))


def test_only_what_is_there_is_shared_and_only_at_the_beginning() -> None:
    blocks = KVBlockManager(num_blocks=6, block_tokens=4)
    blocks.allocate("a", 2)
    for owner, origin, count in [("b", "a", 3), ("b", "nobody", 1), ("a", "a", 1)]:
        with pytest.raises(RuntimeError, match="cannot be shared"):
            blocks.share(owner, origin, count)
    blocks.integrity()


def test_integrity_sees_a_lost_count_of_owners() -> None:
    blocks = KVBlockManager(num_blocks=3, block_tokens=4)
    blocks.allocate("a", 2)
    blocks.share("b", "a", 2)
    del blocks._num_more_owners[1]
    with pytest.raises(RuntimeError, match="more owners"):
        blocks.integrity()


_SHARES = st.tuples(st.sampled_from("abcdef"), st.integers(0, 5), st.sampled_from("abcdef") | st.none())


@given(st.lists(_SHARES, max_size=80))
def test_any_order_of_allocations_shares_and_frees_conserves_blocks(calls: list[tuple[str, int, str | None]]) -> None:
    """With an origin: share. No block is lost, none free while owned, and each owner keeps exactly its own."""
    blocks = KVBlockManager(num_blocks=12, block_tokens=1)
    held: dict[str, list[int]] = {}
    for owner, count, origin in calls:
        if origin is not None:
            if owner not in held and len(held.get(origin, ())) >= count:
                held[owner] = blocks.share(owner, origin, count)
        elif count == 0:
            blocks.free(owner)
            held.pop(owner, None)
        elif blocks.can_allocate(count):
            taken = blocks.allocate(owner, count)
            assert not {block for other in held.values() for block in other} & set(taken)
            held[owner] = held.get(owner, []) + taken
        blocks.integrity()
        assert {name: list(own) for name, own in blocks.owners().items()} == held
        assert blocks.num_free + len({block for own in held.values() for block in own}) == 12
    for owner in "abcdef":
        blocks.free(owner)
    assert blocks.allocate("all", 12) == list(range(12))
