"""Calls as DeepSeek writes them, inside its own markers:

<calls begin> <call begin>function<sep>NAME\\n```json\\n{...}\\n```<call end> ... <calls end>      V3, R1
<calls begin> <call begin>NAME<sep>{...}<call end> ... <calls end>                             V3.1
"""

from __future__ import annotations

from dist_infer.openai.tools.call_object import ArgumentsText
from dist_infer.openai.tools.machine import CallMachine
from dist_infer.openai.tools.sink import SPACE

CALLS_BEGIN = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
CALLS_END = "<\uff5ctool\u2581calls\u2581end\uff5c>"
CALL_BEGIN = "<\uff5ctool\u2581call\u2581begin\uff5c>"
CALL_END = "<\uff5ctool\u2581call\u2581end\uff5c>"
SEP = "<\uff5ctool\u2581sep\uff5c>"
KIND = "function"
FENCE = "```json"
_MAX_NAME_CHARS = 128


class DeepSeekCalls(CallMachine):
    """A list of calls in markers; the outer pair may be missing."""

    markers = (CALLS_BEGIN, CALL_BEGIN)
    _word = ""

    def _enter(self, marker: str) -> None:
        self._word = ""
        self._state = self._list if marker == CALLS_BEGIN else self._head

    def _list(self, char: str) -> None:
        """Between calls. `_raw` holds the outer marker until a call has come."""
        if not self._held and char in SPACE:
            self._raw += char if self._raw else ""
            return
        self._held += char
        if self._held == CALL_BEGIN:
            self._raw, self._held, self._word = self._raw + CALL_BEGIN, "", ""
            self._state = self._head
        elif self._held == CALLS_END:
            raw, self._raw = self._raw + CALLS_END if self._raw else "", ""
            self._sink.content(raw)
            self._to_content()
        elif not any(marker.startswith(self._held) for marker in (CALL_BEGIN, CALLS_END)):
            self._give_up(self._held)

    def _head(self, char: str) -> None:
        """What stands before the separator: the kind (V3) or the name (V3.1)."""
        if self._held or char == SEP[0]:
            matched = self._matched(char, SEP)
            if matched:
                self._raw += SEP
                self._behind_head()
            elif matched is False:
                self._give_up(self._held)
        else:
            self._take_word(char)

    def _behind_head(self) -> None:
        head, self._word = self._word.strip(SPACE), ""
        if head in self._tools and head != KIND:
            self._arguments(head)
        elif head == KIND:
            self._state = self._name_line
        else:
            self._give_up("")

    def _name_line(self, char: str) -> None:
        if char == "{" and KIND in self._tools and not self._word.strip(SPACE):
            self._arguments(KIND)  # a tool that is called `function`, in V3.1's way
            self._state(char)
        elif char not in "\n`{":
            self._take_word(char)
        elif self._word.strip(SPACE) in self._tools:
            self._name, self._word = self._word.strip(SPACE), ""
            self._state = self._fence
            self._fence(char)
        else:
            self._give_up(char)

    def _fence(self, char: str) -> None:
        if not self._held and char in SPACE:
            self._raw += char
        elif not self._held and char == "{":
            self._arguments(self._name)
            self._state(char)
        else:
            matched = self._matched(char, FENCE)
            if matched:
                self._raw += FENCE
                self._arguments(self._name)
            elif matched is False:
                self._give_up(self._held)

    def _arguments(self, name: str) -> None:
        arguments = ArgumentsText(self._sink, name)
        self._state = lambda char: self._read(arguments, char, self._behind)

    def _behind(self, char: str) -> None:
        self._tail(char, CALL_END, "`}", self._list)

    def _take_word(self, char: str) -> None:
        if len(self._word) < _MAX_NAME_CHARS and (char.isalnum() or char in "_.-" or char in SPACE):
            self._word += char
            self._raw += char
        else:
            self._give_up(char)

    def end(self) -> None:
        if self._raw and not self._sink.is_call_open:
            self._raw += self._held
        super().end()
