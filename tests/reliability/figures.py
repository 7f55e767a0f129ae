"""What a case showed, as a line of JSON for whoever writes the page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reliability.clients import Asked

ENVIRONMENT = "DIST_INFER_RELIABILITY"  # names the file
IS_WHOLE = "DIST_INFER_RELIABILITY_WHOLE" in os.environ  # more is tried than in the daily tests


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one injection. Seconds are from it; None: nothing was to be noticed, or nothing to become ready again.

    left: by clients that went away themselves. wrong: an answer that is not the undisturbed one, or an error in no
    error's shape.
    """

    case: str
    injected: str
    in_flight: int
    answered: int
    left: int
    errored: int
    cut: int
    lost: int
    wrong: int
    detected_s: float | None = None
    ready_s: float | None = None
    note: str = ""

    def write(self) -> None:
        """To the file that the environment names, if it does."""
        if (file := os.environ.get(ENVIRONMENT)) is not None:
            with Path(file).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(self)) + "\n")


def count(
    case: str,
    injected: str,
    asked: Sequence[Asked],
    *,
    in_flight: int,
    detected_s: float | None = None,
    ready_s: float | None = None,
    note: str = "",
) -> Figures:
    """The ends of all that were sent; written down."""
    ends = [one.end for one in asked if one.was_sent]
    figures = Figures(
        case=case,
        injected=injected,
        in_flight=in_flight,
        answered=ends.count("answered"),
        left=ends.count("left"),
        errored=ends.count("errored"),
        cut=ends.count("cut"),
        lost=ends.count("lost"),
        wrong=ends.count("wrong"),
        detected_s=None if detected_s is None else round(detected_s, 2),
        ready_s=None if ready_s is None else round(ready_s, 2),
        note=note,
    )
    figures.write()
    return figures
