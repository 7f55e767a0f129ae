"""Where a parser puts what it found: joins neighbours into one delta, numbers calls, trims the space around them."""

from __future__ import annotations

from collections.abc import Callable

from dist_infer.openai.tools.deltas import BrokenCall, ContentDelta, Delta, Flushed, ReasoningDelta, ToolCallDelta

SPACE = " \t\r\n"


class Sink:
    """Of one answer; owned by its parser.

    Space next to a call or around the reasoning belongs to the format: it is dropped. Any other space comes out as it
    was, with the text behind it.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._deltas: list[Delta] = []
        self._space = ""
        self._is_trimming = False
        self._has_reasoned = False
        self._num_calls = 0
        self._num_complete = 0
        self._is_open = False
        self._broken: list[BrokenCall] = []

    def content(self, text: str) -> None:
        body = text.rstrip(SPACE)
        space = text[len(body) :]
        if body:
            if self._is_trimming:
                body, self._is_trimming = body.lstrip(SPACE), False
            self._text(ContentDelta, self._space + body)
            self._space = space
        elif not self._is_trimming:
            self._space += space

    def reasoning(self, text: str) -> None:
        body = text.rstrip(SPACE)
        if body:
            self._text(ReasoningDelta, self._space + (body if self._has_reasoned else body.lstrip(SPACE)))
            self._has_reasoned, self._space = True, text[len(body) :]
        elif self._has_reasoned:
            self._space += text

    def end_reasoning(self) -> None:
        """What comes now is the answer, without the empty lines before it."""
        self._space, self._is_trimming = "", True

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        self._space, self._is_trimming = "", True
        self._deltas.append(ToolCallDelta(self._num_calls, call_id or self._new_id(), name, ""))
        self._num_calls += 1
        self._is_open = True

    def arguments(self, text: str) -> None:
        """More of the call that was begun last."""
        index = self._num_calls - 1
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, ToolCallDelta) and last.index == index:
            self._deltas[-1] = ToolCallDelta(index, last.id, last.name, last.arguments + text)
        else:
            self._deltas.append(ToolCallDelta(index, None, None, text))

    def complete_call(self) -> None:
        self._is_open = False
        self._num_complete += 1

    def break_call(self, raw: str) -> None:
        """The call that was begun last will not become whole."""
        self._is_open = False
        self._broken.append(BrokenCall(self._num_calls - 1, raw))

    @property
    def is_call_open(self) -> bool:
        """Whether a call was begun that is neither complete nor broken."""
        return self._is_open

    @property
    def num_complete(self) -> int:
        return self._num_complete

    def take(self) -> list[Delta]:
        taken, self._deltas = self._deltas, []
        return taken

    def end(self, *, is_reasoning: bool) -> Flushed:
        if self._space and not self._num_calls and not is_reasoning:
            self._text(ContentDelta, self._space)
        return Flushed(self.take(), "tool_calls" if self._num_complete else None, tuple(self._broken))

    def _text(self, kind: type[ContentDelta] | type[ReasoningDelta], text: str) -> None:
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, kind):
            self._deltas[-1] = kind(last.text + text)
        elif text:
            self._deltas.append(kind(text))
