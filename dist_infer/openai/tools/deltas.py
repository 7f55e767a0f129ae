"""What an answer's text turns into, piece by piece: content, reasoning, calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the visible answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the thought before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of call `index`. The first delta of a call, and no other, has `id` and `name`.

    `arguments` of all deltas of a call, joined, are the JSON text of one object, unless the answer broke off in it.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


Delta: TypeAlias = ContentDelta | ReasoningDelta | ToolCallDelta


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """A call whose arguments never became complete JSON; `raw` is its text as the model wrote it, markers included."""

    index: int
    raw: str


@dataclass(frozen=True, slots=True)
class Flushed:
    """The end of an answer.

    `finish_reason` is "tool_calls" when at least one call is complete; None leaves the engine's own reason standing
    (as does an engine that stopped for length).
    """

    deltas: list[Delta]
    finish_reason: Literal["tool_calls"] | None
    broken: tuple[BrokenCall, ...] = ()
