"""A whole answer at once, for clients that do not stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_infer.openai.tools.deltas import ContentDelta, Delta, ReasoningDelta
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
    """The whole answer through a fresh parser. A call that never became whole is content, as the model wrote it."""
    deltas: list[Delta] = parser.push(text)
    ended = parser.flush()
    broken = {call.index: call.raw for call in ended.broken}
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, ToolCall] = {}
    for delta in [*deltas, *ended.deltas]:
        if isinstance(delta, ContentDelta):
            content.append(delta.text)
        elif isinstance(delta, ReasoningDelta):
            reasoning.append(delta.text)
        elif delta.index in broken:
            content.append(broken[delta.index] if delta.id is not None else "")
        elif delta.id is not None:
            calls[delta.index] = ToolCall(id=delta.id, name=delta.name or "", arguments=delta.arguments)
        else:
            begun = calls[delta.index]
            calls[delta.index] = ToolCall(id=begun.id, name=begun.name, arguments=begun.arguments + delta.arguments)
    return ParsedAnswer(
        content="".join(content) or None,
        reasoning="".join(reasoning) or None,
        calls=tuple(calls.values()),
        finish_reason=ended.finish_reason,
    )
