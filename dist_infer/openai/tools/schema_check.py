"""JSON schemas of clients, checked before they own anything: shape, size, and only keywords that are kept.

A keyword that the grammar would not enforce is refused by name, since an answer that violates it would be a lie.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dist_infer.openai.tools.errors import FieldError

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
MAX_SCHEMA_NODES = 4096
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_LISTS_OF_SCHEMAS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMAS = frozenset({"items", "additionalProperties"})
_VALUES = frozenset(
    {
        "type",
        "enum",
        "const",
        "required",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "$ref",
    }
)
# Say nothing about which values are right.
_NOTES = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentEncoding",
        "contentMediaType",
        "$schema",
        "$id",
        "$anchor",
        "$comment",
    }
)
_KNOWN = _SCHEMAS_BY_NAME | _LISTS_OF_SCHEMAS | _SCHEMAS | _VALUES | _NOTES
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
_TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})


def check_name(param: str, name: object) -> str:
    """The name of a function or of a schema."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name)[:80]
        raise FieldError(param, f"must be 1 to 64 letters, digits, underscores or dashes, not {shown}")
    return name


def check_schema(param: str, schema: object) -> dict[str, Any]:
    """A plain copy of the schema. Raises FieldError with the place inside it."""
    if not isinstance(schema, Mapping):
        raise FieldError(param, f"must be a JSON Schema, an object, not {type(schema).__name__}")
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        num_bytes = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise FieldError(param, f"holds what JSON cannot say: {error}") from None
    if num_bytes > MAX_SCHEMA_BYTES:
        raise FieldError(param, f"has {num_bytes} bytes as JSON, more than the {MAX_SCHEMA_BYTES} allowed")
    plain: dict[str, Any] = json.loads(text)
    _Walk().schema(param, plain, 0)
    return plain


class _Walk:
    def __init__(self) -> None:
        self._num_nodes = 0

    def schema(self, place: str, schema: object, depth: int) -> None:
        self._num_nodes += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise FieldError(place, f"is nested deeper than the {MAX_SCHEMA_DEPTH} levels allowed")
        if self._num_nodes > MAX_SCHEMA_NODES:
            raise FieldError(place, f"is one of more than the {MAX_SCHEMA_NODES} subschemas allowed")
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise FieldError(place, f"must be a JSON Schema (an object, true or false), not {type(schema).__name__}")
        for keyword, value in schema.items():
            where = f"{place}.{keyword}"
            if keyword not in _KNOWN:
                raise FieldError(where, "is no keyword that can be enforced: leave it out, or say it another way")
            if keyword in _SCHEMAS_BY_NAME:
                for name, inner in _typed(where, value, dict, "an object").items():
                    self.schema(f"{where}.{name}", inner, depth + 1)
            elif keyword in _LISTS_OF_SCHEMAS:
                for index, inner in enumerate(_typed(where, value, list, "a list")):
                    self.schema(f"{where}[{index}]", inner, depth + 1)
            elif keyword in _SCHEMAS:
                self.schema(where, value, depth + 1)
            else:
                _check_value(where, keyword, value)


def _check_value(where: str, keyword: str, value: object) -> None:
    if keyword == "$ref" and not (isinstance(value, str) and value.startswith("#")):
        raise FieldError(where, "must point into the schema itself (#/$defs/...): nothing is fetched")
    if keyword == "format" and (not isinstance(value, str) or value not in FORMATS):
        raise FieldError(where, f"is {value!r:.80}; formats that can be enforced: {', '.join(sorted(FORMATS))}")
    if keyword == "type":
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
            raise FieldError(where, f"is {value!r:.80}; types are {', '.join(sorted(_TYPES))}, or a list of them")
    if keyword in ("enum", "required"):
        values = _typed(where, value, list, "a list")
        if keyword == "enum" and not values:
            raise FieldError(where, "is empty: no answer could be right")
        if keyword == "required" and not all(isinstance(name, str) for name in values):
            raise FieldError(where, "must be a list of names")


def _typed(where: str, value: object, kind: type, words: str) -> Any:
    if not isinstance(value, kind):
        raise FieldError(where, f"must be {words}, not {type(value).__name__}")
    return value
