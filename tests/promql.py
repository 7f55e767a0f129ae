"""Enough of PromQL to read the queries of this repository; what it does not know is an error."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"\s*(?:(?P<text>\"[^\"]*\")|(?P<range>\[(?:\d+[smhd]|\$__rate_interval)\])|(?P<number>\d+(?:\.\d+)?)"
    r"|(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)|(?P<op>=~|!~|!=|==|>=|<=|[-+*/=<>(){},]))"
)
_AGGREGATIONS = {"sum", "avg", "max", "min", "count"}
_FUNCTIONS = {"rate": True, "increase": True, "time": False, "histogram_quantile": False}  # takes a range
_BINARY = {"+", "-", "*", "/", "==", "!=", ">", "<", ">=", "<="}


@dataclass
class Query:
    """selectors: (metric, labels its matchers name, has a range); groupings: (labels of `by`, metrics inside)."""

    selectors: list[tuple[str, set[str], bool]] = field(default_factory=list)
    groupings: list[tuple[set[str], set[str]]] = field(default_factory=list)


class _Parser:
    def __init__(self, text: str) -> None:
        self.query, self._tokens, at = Query(), [], 0
        while at < len(text.rstrip()):
            found = _TOKEN.match(text, at)
            assert found is not None, f"not understood: {text[at:]!r}"
            self._tokens.append((str(found.lastgroup), found[found.lastgroup or 0]))
            at = found.end()
        self._at = 0

    def whole(self) -> Query:
        self._expression()
        assert self._peek() == ("end", ""), f"something is left over: {self._peek()}"
        return self.query

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def _take(self, value: str | None = None, kind: str | None = None) -> str:
        found = self._peek()
        assert value is None or found[1] == value, f"{value!r} was expected, not {found}"
        assert kind is None or found[0] == kind, f"a {kind} was expected, not {found}"
        self._at += 1
        return found[1]

    def _expression(self) -> None:
        self._operand()
        while self._peek()[1] in _BINARY:
            self._take()
            self._operand()

    def _operand(self) -> None:
        kind, value = self._peek()
        if kind == "number":
            self._take()
        elif value == "(":
            self._take()
            self._expression()
            self._take(")")
        elif value in _AGGREGATIONS:
            self._aggregation()
        elif value in _FUNCTIONS:
            self._function()
        else:
            self._selector()

    def _aggregation(self) -> None:
        self._take()
        labels: set[str] = set()
        if self._peek()[1] == "by":
            self._take()
            labels = set(self._list("(", ")", lambda: self._take(kind="name")))
        before = len(self.query.selectors)
        self._take("(")
        self._expression()
        self._take(")")
        self.query.groupings.append((labels, {name for name, _, _ in self.query.selectors[before:]}))

    def _function(self) -> None:
        takes_range = _FUNCTIONS[self._take()]
        before = len(self.query.selectors)
        self._list("(", ")", self._expression)
        for name, _, has_range in self.query.selectors[before:]:
            assert not takes_range or has_range, f"{name} needs a range"

    def _selector(self) -> None:
        name, labels = self._take(kind="name"), set()

        def matcher() -> None:
            labels.add(self._take(kind="name"))
            assert self._take(kind="op") in ("=", "!=", "=~", "!~")
            self._take(kind="text")

        if self._peek()[1] == "{":
            self._list("{", "}", matcher)
        has_range = self._peek()[0] == "range"
        if has_range:
            self._take()
        self.query.selectors.append((name, labels, has_range))

    def _list(self, opening: str, closing: str, item: object) -> list[str]:
        assert callable(item)
        found = []
        self._take(opening)
        while self._peek()[1] != closing:
            found.append(item())
            if self._peek()[1] != closing:
                self._take(",")
        self._take(closing)
        return found


def parse(text: str) -> Query:
    """AssertionError for what is no query."""
    return _Parser(text).whole()
