"""How the ranks of a run stand: one closed union of states, each with what is known then. Plain data.

`kind` tells them apart where they cross processes as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Units of the packed store that are there, of all; total 0: unknown. detail: which one."""

    done: int
    total: int
    detail: str = ""
    kind: Literal["packing"] = "packing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """Processes are being started, each where the plan wants it."""

    kind: Literal["placing"] = "placing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connecting:
    """All processes are there; they are looking for each other."""

    kind: Literal["connecting"] = "connecting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Resident units that are read, of all."""

    done: int
    total: int
    kind: Literal["loading"] = "loading"


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmingUp:
    """All weights are where they belong; what stands before the ranks (text, engine) is being made."""

    kind: Literal["warming_up"] = "warming_up"


Step: TypeAlias = Packing | Placing | Connecting | Loading | WarmingUp
"""On the way to Ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """epoch: which gang serves, 0 the first. note: what differs from the gang before, in words; empty: nothing."""

    epoch: int = 0
    note: str = ""
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Degraded:
    """Ranks were lost and others are being started; requests wait.

    cause: of the last loss. since_s: when ranks were there last, seconds since 1970. attempt: of this loss, from 1.
    step: how far that is.
    """

    cause: str
    since_s: float
    attempt: int
    step: Step | None = None
    kind: Literal["degraded"] = "degraded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining:
    """It is being closed."""

    kind: Literal["draining"] = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """For good."""

    cause: str
    kind: Literal["failed"] = "failed"


GangState: TypeAlias = Step | Ready | Degraded | Draining | Failed


def describe(state: GangState) -> str:
    """One line for people."""
    match state:
        case Packing():
            return _counted("packing", state.done, state.total)
        case Placing():
            return "starting workers"
        case Connecting():
            return "connecting"
        case Loading():
            return _counted("loading", state.done, state.total)
        case WarmingUp():
            return "warming up"
        case Ready():
            return f"ready ({state.note})" if state.note else "ready"
        case Degraded():
            step = f", {describe(state.step)}" if state.step is not None else ""
            return f"degraded: {state.cause}; attempt {state.attempt} to replace the ranks{step}"
        case Draining():
            return "draining"
        case Failed():
            return f"failed: {state.cause}"
    assert_never(state)


def _counted(what: str, done: int, total: int) -> str:
    return f"{what} {done} of {total}" if total else what
