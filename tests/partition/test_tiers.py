"""Residency for a cyclic scan: within the budget, evenly spread, and never worse than it needs to be."""

from hypothesis import given
from hypothesis import strategies as st

from partition.tiers import choose_tiers, minimum_bytes

SIZES = st.integers(1, 3).flatmap(
    lambda ranks: st.lists(st.tuples(*[st.integers(1, 100)] * ranks), min_size=1, max_size=12)
)


@given(sizes=SIZES, budget=st.integers(0, 2500), slots=st.integers(2, 4), shared=st.booleans())
def test_a_choice_fits_and_only_a_misfit_is_refused(sizes, budget, slots, shared):
    ranks = range(len(sizes[0]))
    budgets = [budget] if shared else [budget] * len(sizes[0])
    choice = choose_tiers(sizes, budgets, pinned_first=(0, len(sizes) - 1), num_slots=slots)
    least = minimum_bytes(sizes)
    if choice is None:
        # what minimum_bytes promises to fit, fits
        assert sum(least) > budget if shared else max(least) > budget
        return
    streamed = [unit for unit, stays in zip(sizes, choice.resident, strict=True) if not stays]
    for rank in ranks:
        slot = max((unit[rank] for unit in streamed), default=0)
        kept = sum(unit[rank] for unit, stays in zip(sizes, choice.resident, strict=True) if stays)
        assert choice.slot_bytes[rank] == slot
        assert choice.used_bytes[rank] == kept + choice.num_slots * slot
    assert (sum(choice.used_bytes) if shared else max(choice.used_bytes)) <= budget
    assert choice.num_slots == (0 if not streamed else choice.num_slots)
    assert not streamed or 2 <= choice.num_slots <= min(slots, len(streamed) + 1)


def test_everything_that_fits_stays_without_slots():
    choice = choose_tiers([(5,), (7,), (5,)], [17])
    assert choice is not None
    assert choice.resident == (True, True, True)
    assert choice.num_slots == 0


def test_resident_layers_are_evenly_spread():
    """A clump of resident layers followed by a clump of streamed ones stalls: reads hide only behind the first."""
    choice = choose_tiers([(10,)] * 30, [10 * (10 + 3)])
    assert choice is not None
    kept = [i for i, stays in enumerate(choice.resident) if stays]
    assert len(kept) == 10
    gaps = {(after - before) % 30 for before, after in zip(kept, kept[1:] + kept[:1], strict=True)}
    assert gaps == {3}


def test_pinning_a_large_head_shrinks_the_slots():
    sizes = [(40,), *[(10,)] * 8, (40,)]
    # streaming all needs 2 x 40; with both ends pinned: 80 + 3 x 10
    choice = choose_tiers(sizes, [80 + 3 * 10 + 4 * 10], pinned_first=(0, 9))
    assert choice is not None
    assert choice.resident[0]
    assert choice.resident[9]
    assert choice.slot_bytes == (10,)
    assert sum(choice.resident) == 6


def test_an_end_that_does_not_pay_is_streamed():
    sizes = [(40,), *[(10,)] * 8, (40,)]
    choice = choose_tiers(sizes, [80], pinned_first=(0, 9))
    assert choice is not None
    assert choice.resident == (False,) * 10
    assert choice.num_slots == 2
