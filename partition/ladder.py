"""The settings that residency may have, from most kept to nothing kept: ladders that a budget is held against.

There are two ways to spread what stays over the cycle:

    whole units   L0 ▒▒L1▒▒ L2 ▒▒L3▒▒ L4 ▒▒L5▒▒ →      ▒ resident; slots as large as a unit
    cut units     ▒L0 ▒L1 ▒▒L2 ▒L3 ▒▒L4 ▒L5 →          every streamed part, and so every slot, is smaller

Cut units climb: the kind of unit with the largest streamed part keeps one more parameter, again and again. Between two
rungs an evenly spread part of that kind is one further. A lower rung streams more and needs larger slots, so the
highest that fits is the best, and what it leaves over is less than one parameter of one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from partition.cut_points import CutPoint
from partition.rank_bytes import Bytes, largest, minus, plus, times, total


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Units that weigh the same and may be cut at the same places.

    `kept[level]` and `streamed[level]`: bytes of one unit, from nothing kept (0) to everything.
    """

    units: tuple[int, ...]
    cuts: tuple[CutPoint, ...]
    kept: tuple[Bytes, ...]
    streamed: tuple[Bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One setting of all units. `kept`, `slot`, `streamed`: bytes; slot is that of the largest streamed part.

    Units in `pinned` stay whole, as do `spread` evenly spread ones of the others. With `levels`, one for each kind of
    the others, units are cut instead, and up to `room` units of kind `next` may go one level up: each keeps `gain` more
    and streams `saved` less.
    """

    pinned: frozenset[int]
    kept: Bytes
    slot: Bytes
    streamed: Bytes
    spread: int = 0
    levels: tuple[int, ...] = ()
    next: int = 0
    room: int = 0
    gain: Bytes = ()
    saved: Bytes = ()

    @cached_property
    def kept_total(self) -> int:
        """Of all ranks: what stays."""
        return sum(self.kept)

    def used(self, slots: int, floor: Bytes) -> Bytes:
        """What stays, and the slots, of at least `floor` each."""
        return plus(self.kept, times(slots, largest(self.slot, floor)))


def kinds_of(
    units: Sequence[int], sizes: Sequence[Bytes], cuts: Sequence[tuple[CutPoint, ...]], nothing: Bytes
) -> tuple[Kind, ...]:
    """The kinds among `units`. sizes and cuts: of all units."""
    alike: dict[tuple[Bytes, tuple[CutPoint, ...]], list[int]] = {}
    for unit in units:
        alike.setdefault((sizes[unit], cuts[unit]), []).append(unit)
    return tuple(
        Kind(
            units=tuple(own),
            cuts=places,
            kept=(nothing, *(cut.kept_bytes for cut in places), size),
            streamed=(size, *(minus(size, cut.streamed_from) for cut in places), nothing),
        )
        for (size, places), own in alike.items()
    )


def whole_rungs(units: Sequence[int], kinds: Sequence[Kind], nothing: Bytes) -> Iterator[Rung]:
    """Some of the units kept whole, most first.

    Every number is there: slots shrink when the last of the largest units is kept, so fitting is not monotonic.
    """
    kind_of = {unit: number for number, kind in enumerate(kinds) for unit in kind.units}
    everything = total([times(len(kind.units), kind.streamed[0]) for kind in kinds], nothing)
    for count in range(len(units), -1, -1):
        num_kept = [0] * len(kinds)
        for unit in spread(units, count):
            num_kept[kind_of[unit]] += 1
        kept = slot = nothing
        for kind, number in zip(kinds, num_kept, strict=True):
            kept = plus(kept, times(number, kind.kept[-1]))
            if number < len(kind.units):
                slot = largest(slot, kind.streamed[0])
        yield Rung(pinned=frozenset(), kept=kept, slot=slot, streamed=minus(everything, kept), spread=count)


def cut_rungs(kinds: Sequence[Kind], nothing: Bytes) -> Iterator[Rung]:
    """The units of these kinds cut, most kept first."""
    levels = [0] * len(kinds)
    kept, streamed = nothing, total([times(len(kind.units), kind.streamed[0]) for kind in kinds], nothing)
    rungs: list[Rung] = []
    while True:
        parts = [kind.streamed[level] for kind, level in zip(kinds, levels, strict=True)]
        here = Rung(
            pinned=frozenset(), kept=kept, slot=largest(nothing, *parts), streamed=streamed, levels=tuple(levels)
        )
        climbing = [number for number, kind in enumerate(kinds) if levels[number] <= len(kind.cuts)]
        if not climbing:
            return reversed([*rungs, here])
        number = max(climbing, key=lambda number: sum(parts[number]))
        kind, level = kinds[number], levels[number]
        gain = minus(kind.kept[level + 1], kind.kept[level])
        saved = minus(kind.streamed[level], kind.streamed[level + 1])
        rungs.append(replace(here, next=number, room=len(kind.units) - 1, gain=gain, saved=saved))
        kept = plus(kept, times(len(kind.units), gain))
        streamed = minus(streamed, times(len(kind.units), saved))
        levels[number] += 1


def spread(units: Sequence[int], count: int) -> set[int]:
    """`count` of the units, at even distances."""
    number = len(units)
    return {unit for i, unit in enumerate(units) if (i + 1) * count // number > i * count // number}
