"""Which units stay resident when a stage walks all its units again and again.

The access order is a cycle, for which LRU is the worst policy: it always drops what comes next. So a fixed set stays,
and the streamed units are spread evenly between resident ones, whose computing time then hides the reads:

    cycle   [embed] L0 ▒L1▒ L2 ▒L3▒ L4 ▒L5▒ [head] →      ▒ resident; the ring of slots carries the rest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_SLOTS = 3
MIN_SLOTS = 2

UnitSizes = Sequence[Sequence[int]]
"""[unit][rank] bytes, units in order of use, ranks those of one stage."""


@dataclass(frozen=True, kw_only=True)
class TierChoice:
    """`resident[i]` for unit i. `slot_bytes` per rank, 0 when nothing is streamed. `used_bytes` per rank, all of it."""

    resident: tuple[bool, ...]
    num_slots: int
    slot_bytes: tuple[int, ...]
    used_bytes: tuple[int, ...]


def choose_tiers(
    sizes: UnitSizes,
    budgets: Sequence[int],
    *,
    pinned_first: Sequence[int] = (),
    num_slots: int = DEFAULT_SLOTS,
    min_slots: int = MIN_SLOTS,
    least_slot_bytes: Sequence[int] | None = None,
) -> TierChoice | None:
    """The choice that streams the fewest bytes a pass, or None when not even the smallest ring fits.

    budgets: one number shared by all ranks, or one for each rank (bytes).
    pinned_first: units considered before the others (embedding and head: the largest, and slots are sized by the
    largest streamed unit, so pinning one may shrink every slot).
    num_slots: the ring's length (a ring with more slots than streamed units never wins: keeping them takes less);
    min_slots: how short it may become when the longer ring does not fit at all.
    """
    count, ranks = len(sizes), len(sizes[0]) if sizes else 0
    floor = tuple(least_slot_bytes or (0,) * ranks)
    whole = _use(sizes, (True,) * count, 0, floor)
    if _fits(whole.used_bytes, budgets):
        return whole
    others = [i for i in range(count) if i not in pinned_first]
    totals, most = [sum(unit) for unit in sizes], sum(budgets)
    for slots in range(num_slots, min_slots - 1, -1):
        found: list[TierChoice] = []
        for pinned in _subsets(pinned_first):
            # not bisected: the slots shrink when the last of the largest units is kept, so fitting is not monotonic
            for extra in range(len(others), -1, -1):
                kept = pinned | _spread(others, extra)
                if sum(totals[unit] for unit in kept) > most:
                    continue
                choice = _use(sizes, tuple(unit in kept for unit in range(count)), slots, floor)
                if _fits(choice.used_bytes, budgets):
                    found.append(choice)
                    break
        if found:
            return min(found, key=lambda choice: _streamed(sizes, choice))
    return None


def minimum_bytes(sizes: UnitSizes, *, slots: int = MIN_SLOTS, pinned_first: Sequence[int] = ()) -> tuple[int, ...]:
    """Per rank, bytes that always suffice: the whole, or some of `pinned_first` and a ring of `slots` for the rest.

    Keeping a large embedding takes less than `slots` buffers of its size.
    """
    count = len(sizes)
    nothing = (0,) * (len(sizes[0]) if sizes else 0)
    choices = [_use(sizes, (True,) * count, 0, nothing)]
    for kept in _subsets(pinned_first):
        choices.append(_use(sizes, tuple(unit in kept for unit in range(count)), slots, nothing))
    return min((choice.used_bytes for choice in choices), key=sum)


def pinned_bytes(sizes: UnitSizes, pinned: Sequence[int], *, slots: int) -> tuple[int, ...]:
    """Per rank, bytes of these units kept and a ring of `slots` for the rest."""
    kept = tuple(unit in pinned for unit in range(len(sizes)))
    return _use(sizes, kept, slots, (0,) * (len(sizes[0]) if sizes else 0)).used_bytes


def _spread(units: Sequence[int], count: int) -> set[int]:
    """`count` of the units, at even distances."""
    total = len(units)
    return {unit for i, unit in enumerate(units) if (i + 1) * count // total > i * count // total}


def _subsets(pinned_first: Sequence[int]) -> list[set[int]]:
    sets: list[set[int]] = [set()]
    for unit in pinned_first:
        sets += [known | {unit} for known in sets]
    return sorted(sets, key=len, reverse=True)


def _use(sizes: UnitSizes, resident: tuple[bool, ...], slots: int, floor: tuple[int, ...]) -> TierChoice:
    streamed = [unit for unit, stays in zip(sizes, resident, strict=True) if not stays]
    slots = slots if streamed else 0
    slot_bytes = [max(least, *(unit[rank] for unit in streamed)) if streamed else 0 for rank, least in enumerate(floor)]
    kept = [sum(unit[rank] for unit, stays in zip(sizes, resident, strict=True) if stays) for rank in range(len(floor))]
    return TierChoice(
        resident=resident,
        num_slots=slots,
        slot_bytes=tuple(slot_bytes),
        used_bytes=tuple(stay + slots * slot for stay, slot in zip(kept, slot_bytes, strict=True)),
    )


def _fits(used: Sequence[int], budgets: Sequence[int]) -> bool:
    if len(budgets) == 1:
        return sum(used) <= budgets[0]
    return all(use <= budget for use, budget in zip(used, budgets, strict=True))


def _streamed(sizes: UnitSizes, choice: TierChoice) -> int:
    return sum(sum(unit) for unit, stays in zip(sizes, choice.resident, strict=True) if not stays)
