"""Calls as Hermes and Qwen write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one tag a call."""

from __future__ import annotations

from dist_infer.openai.tools.call_object import CallObject
from dist_infer.openai.tools.machine import CallMachine

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class HermesCalls(CallMachine):
    """One object between two tags."""

    markers = (OPEN,)

    def _enter(self, marker: str) -> None:
        call = CallObject(self._sink, self._tools)
        self._state = lambda char: self._read(call, char, self._behind)

    def _behind(self, char: str) -> None:
        self._tail(char, CLOSE, "}", self._content)
