"""What an answer must look like, as the user says it: a JSON schema, a regular expression, a grammar, or one of a list.

Checked here for its shape and size alone, without the library that compiles it; `GrammarChecker` does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from partition.errors import ConfigError

GrammarKind: TypeAlias = Literal["json_schema", "json_object", "regex", "lark", "choice"]

MAX_GRAMMAR_BYTES = 64 << 10  # UTF-8, of the text or of all choices
MAX_CHOICES = 1024
MAX_SCHEMA_DEPTH = 64


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """Raises ConfigError for what cannot be one. Equal ones compare equal, and JSON schemas do whatever their blanks.

    kind: which of the others is used. text: a JSON schema (an object), a regular expression or a Lark grammar with the
    rule `start`; each holds for the whole answer. choices: texts, of which the answer is one. json_object: any object.
    """

    kind: GrammarKind
    text: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kinds = get_args(GrammarKind)
        if self.kind not in kinds:
            raise ConfigError(f"grammar: kind must be one of {', '.join(kinds)}, not {repr(self.kind)[:80]}")
        if not isinstance(self.text, str):
            raise ConfigError(f"grammar: text must be a string, not {type(self.text).__name__}")
        object.__setattr__(self, "choices", _checked_choices(self.kind, self.choices))
        if self.kind in ("choice", "json_object"):
            if self.text:
                raise ConfigError(f"grammar: kind {self.kind} takes no text")
        elif not self.text.strip():
            raise ConfigError(f"grammar: kind {self.kind} needs a text, and it is empty")
        _check_size(self.text, *self.choices)
        if self.kind == "json_schema":
            object.__setattr__(self, "text", _compact_schema(self.text))
        if self.kind == "regex" and (len(self.text) - len(self.text.rstrip("\\"))) % 2:
            raise ConfigError("grammar: the regular expression ends with a backslash that escapes nothing")

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Grammar:
        """schema: as text, or as what json.loads makes of it."""
        if isinstance(schema, str):
            return cls(kind="json_schema", text=schema)
        try:
            return cls(kind="json_schema", text=json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"grammar: the JSON schema is no JSON: {error}") from None

    @classmethod
    def json_object(cls) -> Grammar:
        return cls(kind="json_object")

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        return cls(kind="regex", text=pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        return cls(kind="lark", text=text)

    @classmethod
    def choice(cls, choices: Iterable[str]) -> Grammar:
        return cls(kind="choice", choices=(choices,) if isinstance(choices, str) else tuple(choices))


def _checked_choices(kind: str, choices: object) -> tuple[str, ...]:
    if not isinstance(choices, list | tuple):
        raise ConfigError(f"grammar: choices must be a list of texts, not {type(choices).__name__}")
    if kind != "choice":
        if choices:
            raise ConfigError(f"grammar: kind {kind} takes no choices")
        return ()
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise ConfigError(f"grammar: choices must be 1 to {MAX_CHOICES} texts, not {len(choices)}")
    if bad := [choice for choice in choices if not isinstance(choice, str) or not choice]:
        raise ConfigError(f"grammar: each of the choices must be a text that is not empty, not {repr(bad[0])[:80]}")
    return tuple(choices)


def _check_size(*texts: str) -> None:
    try:
        num_bytes = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError:
        raise ConfigError("grammar: its text has half of a surrogate pair, which no answer can have") from None
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise ConfigError(f"grammar: {num_bytes} bytes of text, more than the {MAX_GRAMMAR_BYTES} that are allowed")


def _compact_schema(text: str) -> str:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(schema, dict):
            raise ConfigError(f"grammar: a JSON schema is an object, not {repr(schema)[:80]}")
        if _is_deeper(schema, MAX_SCHEMA_DEPTH):
            raise ConfigError(f"grammar: the JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        compact = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
        compact.encode()
    except ConfigError:
        raise
    except UnicodeEncodeError:
        raise ConfigError("grammar: the JSON schema has half of a surrogate pair, which no answer can have") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"grammar: the JSON schema is no JSON: {str(error)[:200]}") from None
    return compact


def _refuse_constant(name: str) -> None:
    raise ConfigError(f"grammar: the JSON schema has {name}, which is no JSON")


def _is_deeper(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        return depth == 0 or any(_is_deeper(inner, depth - 1) for inner in value.values())
    if isinstance(value, list):
        return depth == 0 or any(_is_deeper(inner, depth - 1) for inner in value)
    return False
