"""A whole answer, put together from a parser's deltas, for clients that do not stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dist_infer.openai.tools.deltas import ContentDelta, Delta, Flushed, ReasoningDelta
from dist_infer.openai.tools.parser import ToolParser


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """`arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class ParsedAnswer:
    """`content` and `reasoning` are None when there is none. See Flushed for `finish_reason`."""

    content: str | None
    reasoning: str | None
    calls: tuple[ToolCall, ...]
    finish_reason: Literal["tool_calls"] | None


def parse_answer(parser: ToolParser, text: str) -> ParsedAnswer:
    """The whole answer through a fresh parser."""
    deltas = parser.push(text)
    return join_deltas(deltas, parser.flush())


def join_deltas(given: Sequence[Delta], ended: Flushed) -> ParsedAnswer:
    """All that `push` gave, and what `flush` did. A call that never became whole is content, as it was written."""
    broken = {call.index: call.raw for call in ended.broken}
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, ToolCall] = {}
    arguments: dict[int, list[str]] = {}
    for delta in [*given, *ended.deltas]:
        if isinstance(delta, ContentDelta):
            content.append(delta.text)
        elif isinstance(delta, ReasoningDelta):
            reasoning.append(delta.text)
        elif delta.index in broken:
            content.append(broken[delta.index] if delta.id is not None else "")
        else:
            arguments.setdefault(delta.index, []).append(delta.arguments)
            if delta.id is not None:
                calls[delta.index] = ToolCall(id=delta.id, name=delta.name or "", arguments="")
    return ParsedAnswer(
        content="".join(content) or None,
        reasoning="".join(reasoning) or None,
        calls=tuple(
            ToolCall(id=call.id, name=call.name, arguments="".join(arguments[index])) for index, call in calls.items()
        ),
        finish_reason=ended.finish_reason,
    )
