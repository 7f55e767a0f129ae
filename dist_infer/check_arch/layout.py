"""How a model is cut and stored in one run of the check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`streamed`: the host budget holds only a part of the weights, the rest comes from disk in every pass."""

    tensor: int
    pipeline: int
    streamed: bool

    def __str__(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} {'streamed' if self.streamed else 'resident'}"


def layouts_of(
    tensor: Sequence[int] = (1, 2), pipeline: Sequence[int] = (1, 2), *, every: bool = False
) -> tuple[Layout, ...]:
    """The layouts of a check, the simplest first.

    One tensor rank costs no process: all numbers of stages, resident and streamed. Several ranks start as many
    processes, so without `every` they run twice: the fewest stages resident, the most streamed.
    """
    found = []
    for degree in sorted(set(tensor)):
        for stages in sorted(set(pipeline)):
            for streamed in (False, True):
                extreme = stages == (max(pipeline) if streamed else min(pipeline))
                if degree == 1 or every or extreme:
                    found.append(Layout(tensor=degree, pipeline=stages, streamed=streamed))
    return tuple(found)
