"""What of each unit stays resident when a stage walks all its units again and again.

The access order is a cycle, for which LRU is the worst policy: it always drops what comes next. So a fixed part stays,
spread evenly over the cycle, so that computing hides the reads everywhere; a ring of slots carries the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from partition.cut_points import CutPoint
from partition.ladder import Rung, cut_rungs, kinds_of, spread, whole_rungs
from partition.rank_bytes import Bytes, largest, minus, plus, times, total

DEFAULT_SLOTS = 3
MIN_SLOTS = 2

UnitSizes = Sequence[Sequence[int]]
"""[unit][rank] bytes, units in order of use, ranks those of one stage."""


@dataclass(frozen=True, kw_only=True)
class TierChoice:
    """`resident[i]`: unit i stays whole; `cuts[i]`: where it is cut if a part of it stays. Bytes are per rank.

    `slot_bytes`: 0 when nothing is streamed. `used_bytes`: all that stays, and the slots.
    """

    resident: tuple[bool, ...]
    cuts: tuple[CutPoint | None, ...]
    num_slots: int
    slot_bytes: Bytes
    used_bytes: Bytes
    streamed_bytes: Bytes


class Cycle:
    """The units of one stage. Everything that does not depend on a budget is worked out once.

    pinned_first: units considered before the others (embedding and head: the largest, and slots are sized by the
    largest streamed part, so pinning one may shrink every slot). They are never cut.
    cuts: for each unit, where it may be cut, least kept first; without, units stay or go as a whole.
    num_ranks: to be given where there may be no units.
    """

    def __init__(
        self,
        sizes: UnitSizes,
        *,
        pinned_first: Sequence[int] = (),
        cuts: Sequence[Sequence[CutPoint]] | None = None,
        num_ranks: int | None = None,
    ) -> None:
        self._sizes = tuple(tuple(unit) for unit in sizes)
        self._cuts = tuple(tuple(unit) for unit in cuts) if cuts is not None else ((),) * len(self._sizes)
        self._pinned_first = tuple(pinned_first)
        self._nothing: Bytes = (0,) * (num_ranks or (len(self._sizes[0]) if self._sizes else 0))
        self._whole = total(self._sizes, self._nothing)
        self._others = tuple(i for i in range(len(self._sizes)) if i not in self._pinned_first)
        self._kinds = kinds_of(self._others, self._sizes, self._cuts, self._nothing)
        whole = list(whole_rungs(self._others, self._kinds, self._nothing))
        cut = list(cut_rungs(self._kinds, self._nothing))
        # whole units before cut ones, so that a tie is decided for fewer cuts
        self._ladders = [
            [self._with_ends(rung, pinned) for rung in ladder]
            for ladder in (whole, cut)
            for pinned in _subsets(self._pinned_first)
        ]
        self._chosen: dict[tuple[object, ...], TierChoice | None] = {}
        self._least: dict[tuple[int, Bytes], Bytes] = {}

    @property
    def total_bytes(self) -> int:
        """Of all units on all ranks."""
        return sum(self._whole)

    def choose(
        self,
        budgets: Sequence[int],
        *,
        num_slots: int = DEFAULT_SLOTS,
        min_slots: int = MIN_SLOTS,
        least_slot_bytes: Sequence[int] | None = None,
    ) -> TierChoice | None:
        """The choice that streams the fewest bytes a pass, or None when not even the smallest ring fits.

        budgets: one number shared by all ranks, or one for each rank (bytes).
        num_slots: the ring's length (a ring with more slots than streamed units never wins: keeping them takes less);
        min_slots: how short it may become when the longer ring does not fit at all.
        """
        floor = tuple(least_slot_bytes) if least_slot_bytes is not None else self._nothing
        key = (tuple(budgets), num_slots, min_slots, floor)
        if key not in self._chosen:
            self._chosen[key] = self._search(tuple(budgets), num_slots, min_slots, floor)
        return self._chosen[key]

    def minimum_bytes(self, slots: int = MIN_SLOTS, least_slot_bytes: Sequence[int] | None = None) -> Bytes:
        """Per rank, bytes that always suffice: the whole, or what a ring of `slots` and the units beside it take least.

        Keeping a large embedding takes less than `slots` buffers of its size.
        """
        floor = tuple(least_slot_bytes) if least_slot_bytes is not None else self._nothing
        if (slots, floor) not in self._least:
            found = [rung.used(slots, floor) for ladder in self._ladders for rung in ladder]
            self._least[slots, floor] = min([self._whole, *found], key=sum)
        return self._least[slots, floor]

    def pinned_bytes(self, slots: int) -> Bytes:
        """Per rank, bytes of the units of `pinned_first` kept and a ring of `slots` for the rest."""
        return self._ladders[0][-1].used(slots, self._nothing)

    def _search(self, budgets: Bytes, num_slots: int, min_slots: int, floor: Bytes) -> TierChoice | None:
        count = len(self._sizes)
        if _fits(self._whole, budgets):
            return TierChoice(
                resident=(True,) * count,
                cuts=(None,) * count,
                num_slots=0,
                slot_bytes=self._nothing,
                used_bytes=self._whole,
                streamed_bytes=self._nothing,
            )
        for slots in range(num_slots, min_slots - 1, -1):
            found = [best for ladder in self._ladders if (best := _highest(ladder, budgets, slots, floor))]
            if found:
                return self._choice(*min(found, key=lambda at: _streamed(*at)), slots, floor)
        return None

    def _choice(self, rung: Rung, raised: int, slots: int, floor: Bytes) -> TierChoice:
        resident = [unit in rung.pinned for unit in range(len(self._sizes))]
        cuts: list[CutPoint | None] = [None] * len(resident)
        for unit in spread(self._others, rung.spread):
            resident[unit] = True
        for number, (kind, level) in enumerate(zip(self._kinds, rung.levels, strict=True) if rung.levels else ()):
            further = spread(kind.units, raised) if number == rung.next else set()
            for unit in kind.units:
                at = level + (unit in further)
                resident[unit] = at > len(kind.cuts)
                cuts[unit] = kind.cuts[at - 1] if 0 < at <= len(kind.cuts) else None
        more, less = (times(raised, each) if raised else self._nothing for each in (rung.gain, rung.saved))
        return TierChoice(
            resident=tuple(resident),
            cuts=tuple(cuts),
            num_slots=slots,
            slot_bytes=largest(rung.slot, floor),
            used_bytes=plus(rung.used(slots, floor), more),
            streamed_bytes=minus(rung.streamed, less),
        )

    def _with_ends(self, rung: Rung, pinned: frozenset[int]) -> Rung:
        ends = [self._sizes[unit] for unit in self._pinned_first if unit not in pinned]
        return replace(
            rung,
            pinned=pinned,
            kept=plus(rung.kept, total([self._sizes[unit] for unit in pinned], self._nothing)),
            slot=largest(rung.slot, *ends),
            streamed=plus(rung.streamed, total(ends, self._nothing)),
        )


def choose_tiers(
    sizes: UnitSizes,
    budgets: Sequence[int],
    *,
    pinned_first: Sequence[int] = (),
    cuts: Sequence[Sequence[CutPoint]] | None = None,
    num_slots: int = DEFAULT_SLOTS,
    min_slots: int = MIN_SLOTS,
) -> TierChoice | None:
    """`Cycle.choose` for a single question."""
    return Cycle(sizes, pinned_first=pinned_first, cuts=cuts).choose(budgets, num_slots=num_slots, min_slots=min_slots)


def _highest(ladder: Sequence[Rung], budgets: Sequence[int], slots: int, floor: Bytes) -> tuple[Rung, int] | None:
    """The first rung that fits, and how many units go one level further."""
    most = sum(budgets)
    for rung in ladder:
        if rung.kept_total > most:
            continue
        used = rung.used(slots, floor)
        gain = rung.gain
        free = minus(budgets, used) if len(budgets) > 1 else (budgets[0] - sum(used),)
        if len(budgets) == 1:
            gain = (sum(gain),)
        if min(free) >= 0:
            return rung, min([rung.room, *(left // more for left, more in zip(free, gain, strict=False) if more)])
    return None


def _subsets(ends: Sequence[int]) -> list[frozenset[int]]:
    """Of the ends, the largest first."""
    sets: list[frozenset[int]] = [frozenset()]
    for unit in ends:
        sets += [known | {unit} for known in sets]
    return sorted(sets, key=len, reverse=True)


def _streamed(rung: Rung, raised: int) -> int:
    return sum(rung.streamed) - raised * sum(rung.saved)


def _fits(used: Bytes, budgets: Bytes) -> bool:
    if len(budgets) == 1:
        return sum(used) <= budgets[0]
    return all(use <= budget for use, budget in zip(used, budgets, strict=True))
