"""`response_format` of a request to the constraint that keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from dist_infer.openai.tools.errors import FieldError
from dist_infer.openai.tools.schema_check import check_name, check_schema

FIELD = "response_format"
_KINDS = ("text", "json_object", "json_schema")
_SCHEMA_KEYS = ("name", "description", "schema", "strict")


class GrammarText(NamedTuple):
    """A constraint: its kind and its text, as the engine's Grammar takes them. `json_object` has no text."""

    kind: Literal["lark", "json_schema", "json_object"]
    text: str


def response_grammar(response_format: object) -> GrammarText | None:
    """None for no constraint. Raises FieldError.

    A schema is kept whether `strict` is true, false or left out.
    """
    if response_format is None:
        return None
    given = _object(FIELD, response_format)
    kind = given.get("type")
    if kind not in _KINDS:
        raise FieldError(f"{FIELD}.type", f"is {kind!r:.80}; there are {', '.join(_KINDS)}")
    allowed = ("type", "json_schema") if kind == "json_schema" else ("type",)
    _check_keys(FIELD, given, allowed)
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarText("json_object", "")
    place = f"{FIELD}.json_schema"
    wrapped = _object(place, given.get("json_schema"))
    _check_keys(place, wrapped, _SCHEMA_KEYS)
    check_name(f"{place}.name", wrapped.get("name"))
    if not isinstance(wrapped.get("strict"), bool | None):
        raise FieldError(f"{place}.strict", "must be true or false")
    if not isinstance(wrapped.get("description"), str | None):
        raise FieldError(f"{place}.description", "must be a text")
    if wrapped.get("schema") is None:
        raise FieldError(f"{place}.schema", "is missing: give the JSON Schema, or ask for json_object")
    checked = check_schema(f"{place}.schema", wrapped["schema"])
    return GrammarText("json_schema", json.dumps(checked, ensure_ascii=False))


def _object(place: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise FieldError(place, f"must be an object, not {type(value).__name__}")
    return value


def _check_keys(place: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key in given:
        if key not in allowed:
            raise FieldError(f"{place}.{key}"[:200], f"is not known; there are {', '.join(allowed)}")
