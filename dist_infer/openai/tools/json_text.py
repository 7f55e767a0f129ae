"""A strict JSON checker that is given one character after the other.

It keeps no values, only where in the grammar it is, so that text can be passed on while it is still being written.
"""

from __future__ import annotations

from enum import Enum, auto

MAX_DEPTH = 128
_SPACE = " \t\n\r"
_DIGITS = "0123456789"
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


class Place(Enum):
    """What is allowed next."""

    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    LITERAL = auto()
    NUMBER = auto()
    DONE = auto()


class JsonText:
    """One JSON object or array. After a refused character it must not be used any more."""

    def __init__(self) -> None:
        self.place = Place.VALUE
        self._open: list[str] = []
        self._is_key = False
        self._rest = ""  # of a literal
        self._hex_left = 0
        self._number = ""  # what of a number was seen: - 0 1(digits) . f(raction) e s(ign) x(ponent)

    @property
    def depth(self) -> int:
        """Objects and arrays that are open."""
        return len(self._open)

    @property
    def is_done(self) -> bool:
        return self.place is Place.DONE

    @property
    def is_in_key(self) -> bool:
        """Whether the string being read, or just ended, is an object's key."""
        return self._is_key

    def push(self, char: str) -> str | None:
        """The character as JSON may hold it, or None when it cannot stand here.

        A control character inside a string, which strict JSON forbids and models write, comes back escaped.
        """
        place = self.place
        if place is Place.STRING:
            return self._in_string(char)
        if place is Place.NUMBER:
            return self._in_number(char)
        if place is Place.ESCAPE:
            if char == "u":
                self.place, self._hex_left = Place.HEX, 4
            elif char in '"\\/bfnrt':
                self.place = Place.STRING
            else:
                return None
            return char
        if place is Place.HEX:
            if char not in "0123456789abcdefABCDEF":
                return None
            self._hex_left -= 1
            if not self._hex_left:
                self.place = Place.STRING
            return char
        if place is Place.LITERAL:
            if char != self._rest[0]:
                return None
            self._rest = self._rest[1:]
            if not self._rest:
                self.place = Place.COMMA_OR_END
            return char
        if char in _SPACE:
            return char
        return self._between(char)

    def _between(self, char: str) -> str | None:
        place = self.place
        if place is Place.COMMA_OR_END:
            if char == ",":
                self.place = Place.KEY if self._open[-1] == "{" else Place.VALUE
                return char
            return self._close(char)
        if place is Place.COLON:
            if char != ":":
                return None
            self.place = Place.VALUE
            return char
        if place in (Place.KEY, Place.KEY_OR_END):
            if char == '"':
                self.place, self._is_key = Place.STRING, True
                return char
            return self._close(char) if place is Place.KEY_OR_END else None
        if place is Place.VALUE_OR_END and char == "]":
            return self._close(char)
        return self._begin_value(char) if place is not Place.DONE else None

    def _begin_value(self, char: str) -> str | None:
        if char in "{[":
            if len(self._open) == MAX_DEPTH:
                return None
            self._open.append(char)
            self.place = Place.KEY_OR_END if char == "{" else Place.VALUE_OR_END
        elif not self._open:
            return None  # a text, number or literal has no end of its own
        elif char == '"':
            self.place, self._is_key = Place.STRING, False
        elif char in _LITERALS:
            self.place, self._rest = Place.LITERAL, _LITERALS[char]
        elif char == "-" or char in _DIGITS:
            self.place, self._number = Place.NUMBER, char if char in "-0" else "1"
        else:
            return None
        return char

    def _close(self, char: str) -> str | None:
        if char != ("}" if self._open[-1] == "{" else "]"):
            return None
        self._open.pop()
        self.place = Place.COMMA_OR_END if self._open else Place.DONE
        return char

    def _in_string(self, char: str) -> str:
        if char == '"':
            self.place = Place.COLON if self._is_key else Place.COMMA_OR_END
        elif char == "\\":
            self.place = Place.ESCAPE
        elif char < " ":
            return _SHORT_ESCAPES.get(char, f"\\u{ord(char):04x}")
        return char

    def _in_number(self, char: str) -> str | None:
        seen = self._number
        if char in _DIGITS:
            if seen == "0":
                return None
            self._number = {"-": "0" if char == "0" else "1", ".": "f", "e": "x", "s": "x"}.get(seen, seen)
        elif char == "." and seen in "01":
            self._number = "."
        elif char in "eE" and seen in "01f":
            self._number = "e"
        elif char in "+-" and seen == "e":
            self._number = "s"
        elif seen in "01fx":
            self.place = Place.COMMA_OR_END
            return self.push(char)
        else:
            return None
        return char
