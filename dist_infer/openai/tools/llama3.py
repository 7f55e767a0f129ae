"""Calls as Llama 3 writes them: the answer is `{"name": ..., "parameters": {...}}`, or `<|python_tag|>` and that.

Several are separated by `;`, a comma or a line end.
"""

from __future__ import annotations

from collections.abc import Collection

from dist_infer.openai.tools.call_object import CallObject
from dist_infer.openai.tools.machine import CallMachine
from dist_infer.openai.tools.sink import SPACE, Sink

TAG = "<|python_tag|>"


class Llama3Calls(CallMachine):
    """A bare object counts only as the first thing of the answer, or behind another call."""

    markers = (TAG,)

    def __init__(self, sink: Sink, tools: Collection[str], *, parallel: bool) -> None:
        super().__init__(sink, tools, parallel=parallel)
        self._state = self._start

    def _start(self, char: str) -> None:
        if char in SPACE:
            self._sink.content(char)
        elif char == "{":
            self._object(char, is_bare=True)
        else:
            self._to_content(char)

    def _enter(self, marker: str) -> None:
        self._object("", is_bare=False)

    def _object(self, again: str, *, is_bare: bool) -> None:
        call = CallObject(self._sink, self._tools, is_bare=is_bare)
        self._state = lambda char: self._read(call, char, self._between)
        for char in again:
            self._state(char)

    def _between(self, char: str) -> None:
        if char in SPACE or char in ";,":
            self._raw += char
        elif char == "{":
            self._object(char, is_bare=True)
        else:
            raw, self._raw = self._raw, ""
            self._to_content(raw + char)

    def end(self) -> None:
        if self._state == self._between:
            self._raw = ""  # a separator with nothing behind it
        super().end()
