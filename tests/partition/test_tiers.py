"""Residency for a cyclic scan: within the budget, evenly spread, and never worse than it needs to be."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partition.blob_spec import blob_arrays
from partition.cut_points import CutPoint, cut_points
from partition.encoding import EncodingChoice
from partition.model_spec import ModelSpec
from partition.sharding import cut_axes, units_of
from partition.tiers import Cycle, choose_tiers

SIZES = st.integers(1, 3).flatmap(
    lambda ranks: st.lists(st.tuples(*[st.integers(1, 100)] * ranks), min_size=1, max_size=12)
)

LLAMA = ModelSpec.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 2560,
        "vocab_size": 32000,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "intermediate_size": 6912,
        "max_position_embeddings": 4096,
    }
)


def stage(wished="float", tensor=1, ends=True, spec=LLAMA):
    """(sizes, cuts, positions of the ends) of a stage that holds all layers."""
    cut, choice = cut_axes(spec, tensor), EncodingChoice(wished=wished)
    units = [unit for unit in units_of(spec) if ends or unit.name.startswith("layers.")]
    blobs = [[blob_arrays(unit, cut, rank, "bfloat16", choice) for rank in range(tensor)] for unit in units]
    layer = cut_points(blobs[1])
    sizes = [tuple(-(-sum(a.num_bytes + 255 for a in arrays) // 4096) * 4096 for arrays in unit) for unit in blobs]
    return sizes, [layer if unit.name.startswith("layers.") else () for unit in units], (0, 33) if ends else ()


def parts_of(sizes, choice):
    """[unit] -> (kept, streamed) of each rank."""
    found = []
    for size, stays, cut in zip(sizes, choice.resident, choice.cuts, strict=True):
        if cut is not None:
            assert not stays
            streamed = tuple(n - start for n, start in zip(size, cut.streamed_from, strict=True))
            found.append((cut.kept_bytes, streamed))
        else:
            found.append((size, (0,) * len(size)) if stays else ((0,) * len(size), size))
    return found


def check(sizes, choice, budgets):
    """The choice's own figures are right, and it fits."""
    parts = parts_of(sizes, choice)
    ranks = range(len(sizes[0]))
    assert choice.streamed_bytes == tuple(sum(streamed[rank] for _, streamed in parts) for rank in ranks)
    assert choice.slot_bytes == tuple(max(streamed[rank] for _, streamed in parts) for rank in ranks)
    kept = [sum(stays[rank] for stays, _ in parts) for rank in ranks]
    assert choice.used_bytes == tuple(kept[rank] + choice.num_slots * choice.slot_bytes[rank] for rank in ranks)
    if len(budgets) == 1:
        assert sum(choice.used_bytes) <= budgets[0]
    else:
        assert all(used <= budget for used, budget in zip(choice.used_bytes, budgets, strict=True))
    return sum(kept)


def whole_units(sizes, budget, ends, slots):
    """Bytes streamed by the best choice of whole units, evenly spread beside any of the ends; None if none fits."""
    others = [unit for unit in range(len(sizes)) if unit not in ends]
    best = None
    for some in itertools.chain.from_iterable(itertools.combinations(ends, n) for n in range(len(ends) + 1)):
        for count in range(len(others) + 1):
            kept = {u for i, u in enumerate(others) if (i + 1) * count // len(others) > i * count // len(others)} | set(
                some
            )
            rest = [size for unit, size in enumerate(sizes) if unit not in kept]
            slot = sum(map(max, zip(*rest, strict=True))) if rest else 0
            if sum(sum(sizes[unit]) for unit in kept) + slots * slot <= budget:
                best = min(math.inf if best is None else best, sum(map(sum, rest)))
    return best


@given(sizes=SIZES, budget=st.integers(0, 2500), slots=st.integers(2, 4), shared=st.booleans())
def test_a_choice_fits_and_only_a_misfit_is_refused(sizes, budget, slots, shared):
    budgets = [budget] if shared else [budget] * len(sizes[0])
    cycle = Cycle(sizes, pinned_first=(0, len(sizes) - 1))
    choice = cycle.choose(budgets, num_slots=slots)
    if choice is None:
        # what minimum_bytes promises to fit, fits
        least = cycle.minimum_bytes()
        assert sum(least) > budget if shared else max(least) > budget
        return
    check(sizes, choice, budgets)
    streamed = sum(not stays for stays in choice.resident)
    assert bool(choice.num_slots) == bool(streamed)
    assert not streamed or 2 <= choice.num_slots <= min(slots, streamed + 1)


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0, 1),
    wished=st.sampled_from(["float", "int4"]),
    tensor=st.integers(1, 2),
    ends=st.booleans(),
    slots=st.integers(2, 4),
)
def test_the_budget_is_used_to_the_last_parameter(share, wished, tensor, ends, slots):
    """Whole units left up to a layer unused beside three slots of a layer: a fifth of a tight budget."""
    sizes, cuts, pinned = stage(wished, tensor, ends)
    cycle = Cycle(sizes, pinned_first=pinned, cuts=cuts)
    least = sum(cycle.minimum_bytes())
    budget = least + int(share * (cycle.total_bytes - 1 - least))
    choice = cycle.choose([budget], num_slots=slots)
    resident = check(sizes, choice, [budget])
    free = budget - choice.num_slots * sum(choice.slot_bytes)
    steps = [sum(cut.streamed_from) for cut in cuts[1]]
    largest = max(b - a for a, b in itertools.pairwise([0, *steps, sum(sizes[1])]))
    assert free - resident < largest + 2 * 4096 * tensor
    if free >= 2 * sum(sizes[1]):
        assert resident >= 0.85 * free
    whole = whole_units(sizes, budget, pinned, choice.num_slots)
    assert whole is None or sum(choice.streamed_bytes) <= whole


@given(
    kinds=st.lists(
        st.tuples(st.integers(2, 30), st.lists(st.integers(1, 29), max_size=4), st.integers(1, 5)),
        min_size=1,
        max_size=3,
    ),
    budget=st.integers(10, 2500),
)
def test_units_of_several_kinds_share_a_budget(kinds, budget):
    """Dense and expert layers, or layers that a checkpoint stores differently. In units of 4096 bytes."""
    sizes, cuts = [], []
    for pages, edges, count in kinds:
        places = sorted({edge for edge in edges if edge < pages})
        cuts += [
            tuple(CutPoint(kept_bytes=((edge + 1) * 4096,), streamed_from=(edge * 4096,)) for edge in places[:-1])
        ] * count
        sizes += [(pages * 4096,)] * count
    choice = choose_tiers(sizes, [budget * 4096], cuts=cuts)
    whole = whole_units(sizes, budget * 4096, (), choice.num_slots if choice else 2)
    if choice is None:
        assert whole is None
        return
    check(sizes, choice, [budget * 4096])
    assert whole is None or sum(choice.streamed_bytes) <= whole


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


@pytest.mark.parametrize("share", [0.15, 0.4, 0.65, 0.9])
def test_kept_parts_are_evenly_spread(share):
    """All layers keep the same parameters, some of them one more, and these are not next to each other."""
    sizes, cuts, pinned = stage()
    cycle = Cycle(sizes, pinned_first=pinned, cuts=cuts)
    least = sum(cycle.minimum_bytes())
    choice = cycle.choose([least + int(share * (cycle.total_bytes - least))])
    parts = parts_of(sizes, choice)[1:-1]
    levels = [[0, *(cut.kept_bytes[0] for cut in cuts[1]), sizes[1][0]].index(kept[0]) for kept, _ in parts]
    assert max(levels) - min(levels) <= 1
    further = [i for i, level in enumerate(levels) if level > min(levels)]
    gaps = [b - a for a, b in zip(further, [*further[1:], further[0] + 32], strict=True)] if further else [0]
    assert max(gaps) - min(gaps) <= 1


def test_a_tie_is_decided_for_fewer_cuts():
    """Two units of eight whole, or four of them half: the same bytes, but whole ones need fewer reads."""
    page = 4096
    half = (CutPoint(kept_bytes=(2 * page,), streamed_from=(2 * page,)),)
    cycle = Cycle([(4 * page,)] * 8, cuts=[half] * 8)
    tie = cycle.choose([16 * page], num_slots=2)
    assert tie is not None
    assert sum(tie.resident) == 2
    assert not any(tie.cuts)
    # four pages more would keep a third unit; half of every unit shrinks the slots, and so fits as well
    more = cycle.choose([20 * page], num_slots=2)
    assert more is not None
    assert more.cuts == half * 8
    assert more.slot_bytes == (2 * page,)


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


def test_slots_are_no_smaller_than_the_device_needs():
    """Pinned host slots are copied from as a whole slot of the device."""
    choice = Cycle([(10, 10)] * 6).choose([100], num_slots=3, least_slot_bytes=(14, 12))
    assert choice is not None
    assert choice.slot_bytes == (14, 12)
    assert choice.used_bytes == (3 * 14 + 10, 3 * 12 + 10)
