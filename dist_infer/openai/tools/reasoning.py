"""The thought before an answer, told from the answer by its tags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dist_infer.openai.tools.sink import SPACE, Sink


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """How a model marks its thought. `has_started`: the prompt ended with `open`, the answer begins in the thought."""

    open: str = "<think>"
    close: str = "</think>"
    has_started: bool = False


ReasoningName: TypeAlias = Literal["think", "mistral"]
TAGS: dict[str, tuple[str, str]] = {"think": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}


def detect_reasoning(template: str, prompt: str, name: ReasoningName | None = None) -> Reasoning | None:
    """The tags that the chat template names (or those of this `name`), and whether this prompt ends inside a thought.

    None for a model whose template knows no thought, and for a prompt that ends with a closed, empty one: the client
    or the template has switched thinking off.
    """
    end = prompt.rstrip(SPACE)
    for begin, close in TAGS.values() if name is None else (TAGS[name],):
        if end.endswith(begin):
            return Reasoning(open=begin, close=close, has_started=True)
        if (name is not None or close in template) and not end.endswith(close):
            return Reasoning(open=begin, close=close)
    return None


class ThoughtSplitter:
    """Gives the thought at the answer's start to the sink and everything else to `rest`, character by character."""

    def __init__(self, sink: Sink, tags: Reasoning, rest: Callable[[str], None]) -> None:
        self._sink = sink
        self._tags = tags
        self._rest = rest
        self._held = ""
        self._state: Callable[[str], None] = self._start

    @property
    def is_thinking(self) -> bool:
        """Whether the answer, as far as it was read, ends in the thought."""
        return self._state == self._thought

    def feed(self, char: str) -> None:
        self._state(char)

    def end(self) -> None:
        held, self._held = self._held, ""
        if self.is_thinking or (self._tags.has_started and self._state == self._start):
            self._sink.reasoning(held)
        else:
            self._give_rest(held)

    def _start(self, char: str) -> None:
        """Space, then the opening tag if there is one. A model that was started in its thought may write it again."""
        self._held += char
        begin = self._held.lstrip(SPACE)
        if begin == self._tags.open:
            self._held, self._state = "", self._thought
        elif not self._tags.open.startswith(begin):
            held, self._held = self._held, ""
            self._state = self._thought if self._tags.has_started else self._rest
            for each in held:
                self._state(each)

    def _thought(self, char: str) -> None:
        self._held += char
        while self._held:
            if self._held == self._tags.close:
                self._held, self._state = "", self._rest
                self._sink.end_reasoning()
                return
            if self._tags.close.startswith(self._held):
                return
            self._sink.reasoning(self._held[0])
            self._held = self._held[1:]

    def _give_rest(self, text: str) -> None:
        for char in text:
            self._rest(char)
