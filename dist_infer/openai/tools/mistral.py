"""Calls as Mistral writes them, in both of its ways:

[TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]
[TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]g[ARGS]{...}        with [CALL_ID]... before [ARGS] in some versions
"""

from __future__ import annotations

from dist_infer.openai.tools.call_object import ArgumentsText, CallObject
from dist_infer.openai.tools.machine import CallMachine
from dist_infer.openai.tools.sink import SPACE

TAG = "[TOOL_CALLS]"
ARGS = "[ARGS]"
CALL_ID = "[CALL_ID]"
_MAX_NAME_CHARS = 128


class MistralCalls(CallMachine):
    """The first character behind the tag tells a list from a name."""

    markers = (TAG,)

    def _enter(self, marker: str) -> None:
        self._word = ""
        self._name = ""
        self._state = self._first

    def _first(self, char: str) -> None:
        if char in SPACE:
            self._raw += char
        elif char == "[":
            self._raw += char
            self._state = self._item
        else:
            self._state = self._head
            self._head(char)

    def _item(self, char: str) -> None:
        """Before an object of the list."""
        if char in SPACE:
            self._raw += char
        elif char == "{":
            call = CallObject(self._sink, self._tools, takes_id=True)
            self._state = lambda char: self._read(call, char, self._behind_item)
            self._state(char)
        else:
            self._give_up(char)

    def _behind_item(self, char: str) -> None:
        if char == ",":
            self._raw = char
            self._state = self._item
        elif char == "]":
            self._to_content()
        elif char not in SPACE:
            self._to_content(char)

    def _head(self, char: str) -> None:
        """The name, then the id if there is one, each up to the next marker."""
        if not self._held and char == "{":
            self._arguments(char)
        elif self._held or char == "[":
            self._held += char
            if self._held in (ARGS, CALL_ID):
                marker, self._held = self._held, ""
                self._raw += marker
                self._behind_word(marker)
            elif not any(marker.startswith(self._held) for marker in (ARGS, CALL_ID)):
                self._give_up(self._held)
        elif len(self._word) < _MAX_NAME_CHARS and (char.isalnum() or char in "_.-" or char in SPACE):
            self._word += char
            self._raw += char
        else:
            self._give_up(char)

    def _behind_word(self, marker: str) -> None:
        if marker == ARGS:
            self._arguments("")
        elif self._name:
            self._give_up("")
        else:
            self._name, self._word = self._word.strip(SPACE), ""

    def _arguments(self, again: str) -> None:
        word = self._word.strip(SPACE)
        name, call_id = (self._name, word) if self._name else (word, None)
        if name not in self._tools:
            self._give_up(again)
            return
        arguments = ArgumentsText(self._sink, name, call_id if call_id and call_id.isalnum() else None)
        self._state = lambda char: self._read(arguments, char, self._content)
        for char in again:
            self._state(char)

    def end(self) -> None:
        if self._state == self._head:
            self._raw += self._held
        elif self._state == self._item and self._raw == ",":
            self._raw = ""
        super().end()
