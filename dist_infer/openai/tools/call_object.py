"""A call written as one JSON object, `{"name": ..., "arguments": {...}}`, and arguments written alone."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Literal, TypeAlias

from dist_infer.openai.tools.json_text import JsonText, Place
from dist_infer.openai.tools.sink import SPACE, Sink

Progress: TypeAlias = Literal["more", "done", "bad"]

_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("type", "id")


class ArgumentsText:
    """The arguments of a call whose name is known: an object, passed on as it is written."""

    def __init__(self, sink: Sink, name: str, call_id: str | None = None) -> None:
        self._sink = sink
        self._name = name
        self._id = call_id
        self._text = JsonText()

    @property
    def is_complete(self) -> bool:
        return self._text.is_done

    def push(self, char: str) -> Progress:
        """`bad` leaves the character to the caller. The call begins with the first `{`."""
        if not self._text.depth and char in SPACE:
            return "more"
        if not self._text.depth and char != "{":
            return "bad"
        is_first = not self._text.depth
        safe = self._text.push(char)
        if safe is None:
            return "bad"
        if is_first:
            self._sink.begin_call(self._name, self._id)
        self._sink.arguments(safe)
        if not self._text.is_done:
            return "more"
        self._sink.complete_call()
        return "done"


class CallObject:
    """Reads one such object. The call begins once its name is known and its arguments have begun.

    tools: the names that may be called; another name is no call. is_bare: nothing but the object itself says that this
    is a call, so the first key that a call would not have ends the attempt.
    """

    def __init__(self, sink: Sink, tools: Collection[str], *, is_bare: bool = False, takes_id: bool = False) -> None:
        self._sink = sink
        self._tools = tools
        self._is_bare = is_bare
        self._takes_id = takes_id
        self._text = JsonText()
        self._key: str | None = None
        self._member: list[str] = []  # the key, then the value that is being read
        self._name: str | None = None
        self._id: str | None = None
        self._arguments: str | None = None  # what the client was not given yet
        self._has_begun = False
        self._is_streaming = False
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether its name and arguments are whole, though the object may go on."""
        return self._is_complete

    def push(self, char: str) -> Progress:
        """`bad` leaves the character to the caller; the call may be complete even so."""
        if not self._text.depth and char not in SPACE and char != "{":
            return "bad"
        safe = self._text.push(char)
        if safe is None or not self._take(char, safe):
            return "bad"
        if not self._text.is_done:
            return "more"
        return "done" if self._finish() else "bad"

    def _take(self, char: str, safe: str) -> bool:
        text = self._text
        if self._key is None:
            if text.depth == 1 and (text.place in (Place.STRING, Place.ESCAPE, Place.HEX, Place.COLON)):
                if char in SPACE and not self._member:
                    return True
                self._member.append(safe)
                if text.place is Place.COLON:
                    return self._take_key()
            return True
        if not self._member and (char in SPACE or char == ":"):
            return True
        is_end = text.depth <= 1 and text.place in (Place.COMMA_OR_END, Place.KEY, Place.DONE)
        is_behind = is_end and bool(self._member) and self._member[0] in "-0123456789"  # a number ends before this
        if not is_behind:
            self._member.append(safe)
            if self._key in _ARGUMENT_KEYS and self._member[0] == "{":
                self._stream(safe)
        return self._take_member() if is_end else True

    def _take_key(self) -> bool:
        self._key = json.loads("".join(self._member))
        self._member = []
        is_known = self._key == "name" or self._key in _ARGUMENT_KEYS or self._key in _OTHER_KEYS
        if self._key == "name" and self._name is not None:
            return False
        if self._key in _ARGUMENT_KEYS and self._arguments is not None:
            return False
        return is_known or not self._is_bare

    def _take_member(self) -> bool:
        key, raw = self._key, "".join(self._member)
        self._key, self._member = None, []
        if key == "name":
            name = json.loads(raw) if raw[0] == '"' else None
            if name not in self._tools:
                return False
            self._name = name
            self._begin()
        elif key in _ARGUMENT_KEYS:
            if raw[0] != "{":
                arguments = _unpacked(raw)
                if arguments is None:
                    return False
                self._arguments = arguments
                self._begin()
            self._is_streaming = False
            self._complete()
        elif key == "id" and self._takes_id and raw[0] == '"' and raw[1:-1].isalnum():
            self._id = raw[1:-1]
        return True

    def _stream(self, safe: str) -> None:
        self._is_streaming = True
        if self._has_begun:
            self._sink.arguments(safe)
            return
        self._arguments = (self._arguments or "") + safe
        self._begin()

    def _begin(self) -> None:
        """Begin the call if both its name and something of its arguments are there."""
        if self._name is None or self._arguments is None or self._has_begun:
            return
        self._has_begun = True
        self._sink.begin_call(self._name, self._id)
        self._sink.arguments(self._arguments)
        if not self._is_streaming:
            self._complete()

    def _complete(self) -> None:
        if self._has_begun and not self._is_complete:
            self._is_complete = True
            self._sink.complete_call()

    def _finish(self) -> bool:
        if self._name is not None and self._arguments is None:
            self._arguments = "{}"
            self._begin()
        return self._is_complete


def _unpacked(raw: str) -> str | None:
    """Arguments that were packed into a JSON text, as some models do, or left out by null."""
    if raw == "null":
        return "{}"
    inner = json.loads(raw) if raw[0] == '"' else ""
    text = JsonText()
    safe = [text.push(char) for char in inner.strip(SPACE)] if inner.strip(SPACE)[:1] == "{" else []
    return "".join(char or "" for char in safe) if text.is_done and None not in safe else None
