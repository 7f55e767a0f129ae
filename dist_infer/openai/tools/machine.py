"""What all formats share: looking for markers in content, and going back when something is no call after all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Protocol

from dist_infer.openai.tools.call_object import Progress
from dist_infer.openai.tools.sink import SPACE, Sink


class _Reading(Protocol):
    @property
    def is_complete(self) -> bool: ...

    def push(self, char: str) -> Progress: ...


class CallMachine(ABC):
    """Reads the answer character by character, so that it cannot depend on how the text was cut.

    `_state` takes the next character. `_raw` is what of a call was read, to be given back as content.
    """

    markers: tuple[str, ...] = ()

    def __init__(self, sink: Sink, tools: Collection[str], *, parallel: bool) -> None:
        self._sink = sink
        self._tools = tools
        self._parallel = parallel
        self._state: Callable[[str], None] = self._content
        self._held = ""
        self._raw = ""

    @property
    def wants_stop(self) -> bool:
        return not self._parallel and self._sink.num_complete > 0

    def feed(self, char: str) -> None:
        if not self.wants_stop:
            self._state(char)

    def end(self) -> None:
        """The answer is over: what was held back is content, unless it belongs to a complete call."""
        if self.wants_stop:
            return
        if self._sink.is_call_open:
            self._sink.break_call(self._raw)
        elif self._raw:
            self._sink.content(self._raw)
        if self._state == self._content:
            self._sink.content(self._held)
        self._raw = self._held = ""

    @abstractmethod
    def _enter(self, marker: str) -> None:
        """A marker was found in content: set the next state."""

    def _content(self, char: str) -> None:
        self._held += char
        while self._held:
            if self._held in self.markers:
                marker, self._held = self._held, ""
                self._raw = marker
                self._enter(marker)
                return
            if any(marker.startswith(self._held) for marker in self.markers):
                return
            self._sink.content(self._held[0])
            self._held = self._held[1:]

    def _matched(self, char: str, wanted: str) -> bool | None:
        """Whether `_held` and this character are `wanted`; None while they are its beginning."""
        self._held += char
        if self._held == wanted:
            self._held = ""
            return True
        return None if wanted.startswith(self._held) else False

    def _read(self, reading: _Reading, char: str, then: Callable[[str], None]) -> None:
        """Give the character to what reads the call, then go on in state `then` or back to content."""
        progress = reading.push(char)
        self._raw = "" if reading.is_complete else self._raw + char
        if progress == "done":
            self._raw = ""
            self._state = then
        elif progress == "bad" and reading.is_complete:
            self._state = then
            self.feed(char)
        elif progress == "bad":
            self._raw = self._raw.removesuffix(char)
            self._give_up(char)

    def _give_up(self, again: str) -> None:
        """It was no call: what was read of it is content, and `again` is read as content anew."""
        raw, self._raw, self._held = self._raw, "", ""
        if self._sink.is_call_open:
            self._sink.break_call(raw)
        else:
            self._sink.content(raw)
        self._to_content(again)

    def _to_content(self, again: str = "") -> None:
        self._held = ""
        self._state = self._content
        for char in again:
            self.feed(char)

    def _tail(self, char: str, wanted: str, ignored: str, then: Callable[[str], None]) -> None:
        """Between a call's arguments and its closing marker."""
        if not self._held and (char in SPACE or char in ignored):
            return
        matched = self._matched(char, wanted)
        if matched:
            self._state = then
        elif matched is False:
            self._to_content(self._held)


class NoCalls(CallMachine):
    """An answer in which nothing is a call."""

    def _enter(self, marker: str) -> None:
        raise RuntimeError(f"no marker was asked for, {marker!r} was found")
