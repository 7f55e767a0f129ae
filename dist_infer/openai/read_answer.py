"""One answer of a conversation as it is read: content, thought and calls, in chunks or as a message."""

from __future__ import annotations

from typing import Any

from dist_infer.openai.tools import (
    AnswerParser,
    ContentDelta,
    Delta,
    Flushed,
    ReasoningDelta,
    join_deltas,
)
from dist_infer.outputs import TokenEvent


class ReadAnswer:
    """Fed with an answer's events in their order, then ended once. `parser` None: the text is the content.

    shows_thought: whether the client gets it. is_forced: the answer can be nothing but calls; where it breaks off
    behind one, what is left is the beginning of another, and no content. num_tokens counts up to where the parser
    wanted no more.
    """

    def __init__(self, parser: AnswerParser | None, *, shows_thought: bool, is_forced: bool = False) -> None:
        self._parser = parser
        self._is_forced = is_forced
        self._shows_thought = shows_thought
        self._deltas: list[Delta] = []
        self._texts: list[str] = []
        self._ended = Flushed([], None)
        self.num_tokens = 0

    @property
    def is_enough(self) -> bool:
        """Nothing more can come of it: it has had its one call."""
        return self._parser is not None and self._parser.wants_stop

    @property
    def has_calls(self) -> bool:
        """It ends with "tool_calls", once it was ended."""
        return self._ended.finish_reason is not None

    def push(self, event: TokenEvent) -> list[dict[str, Any]]:
        """Deltas of chunks, as they are sent."""
        if self.is_enough:
            return []
        self.num_tokens += len(event.token_ids)
        if self._parser is None:
            self._texts.append(event.text)
            return [{"content": event.text}] if event.text else []
        deltas = self._parser.push(event.text)
        self._deltas += deltas
        return self._shown(deltas)

    def end(self) -> list[dict[str, Any]]:
        """What was held back."""
        if self._parser is None:
            return []
        self._ended = self._parser.flush()
        deltas = self._ended.deltas
        if self._is_forced and self.has_calls:
            deltas = [delta for delta in deltas if not isinstance(delta, ContentDelta)]
        return self._shown(deltas)

    def message(self) -> dict[str, Any]:
        """The whole answer, after its end."""
        if self._parser is None:
            return {"role": "assistant", "content": "".join(self._texts), "refusal": None}
        answer = join_deltas(self._deltas, self._ended)
        thought = answer.reasoning if self._shows_thought else None
        content = answer.content if answer.content or answer.calls or answer.reasoning else ""
        if self._is_forced and answer.calls:
            content = None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if thought is not None:
            message["reasoning_content"] = thought
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return message

    def _shown(self, deltas: list[Delta]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                found.append({"content": delta.text})
            elif not isinstance(delta, ReasoningDelta):
                found.append({"tool_calls": [_call(delta.index, delta.id, delta.name, delta.arguments)]})
            elif self._shows_thought:
                found.append({"reasoning_content": delta.text})
        return found


def _call(index: int, id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    """The first piece of a call says which it is, the others go on with its arguments."""
    if id is None:
        return {"index": index, "function": {"arguments": arguments}}
    return {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
