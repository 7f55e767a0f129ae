"""Bytes from a client to a checked request, or a 400 that names the field."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dist_infer.openai.errors import ApiError, bad_request
from dist_infer.openai.types import REFUSED

M = TypeVar("M", bound=BaseModel)
_SHOWN_CHARS = 80


def parse(kind: type[M], body: bytes) -> M:
    """ApiError 400: no JSON, not an object, an unknown field, a value of the wrong kind or out of range."""
    data = _json(body)
    if not isinstance(data, dict):
        raise bad_request(f"the body must be a JSON object, not {type(data).__name__}", code="invalid_json")
    for name in data:
        if name not in kind.model_fields:
            raise _unknown(name, kind)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # the first alone: a list may hold a hundred thousand bad entries
        first = error.errors(include_url=False, include_context=False)[0]
        raise _explained(first, data) from None


def _json(body: bytes) -> Any:
    if not body.strip():
        raise bad_request("the body is empty: send a JSON object", code="invalid_json")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_json") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is written twice in one object")
    return found


def _unknown(name: str, kind: type[BaseModel]) -> ApiError:
    if name in REFUSED:
        return bad_request(f"`{name}` is refused: {REFUSED[name]}", param=name, code="unsupported_parameter")
    near = difflib.get_close_matches(name[:_SHOWN_CHARS], kind.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known are: {', '.join(kind.model_fields)}"
    return bad_request(f"unknown field `{_shown(name)}`; {hint}", param=_shown(name), code="unknown_parameter")


def _explained(error: ErrorDetails, data: Mapping[str, Any]) -> ApiError:
    """Pydantic's location names branches of unions, too; the ones that are keys or indices of what was sent stay."""
    place = ""
    here: Any = data
    for part in error["loc"]:
        if isinstance(here, dict) and isinstance(part, str) and (part in here or error["type"] == "extra_forbidden"):
            here, place = here.get(part), f"{place}.{part}" if place else part
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here, place = here[part], f"{place}[{part}]"
        elif error["type"] == "missing" and part == error["loc"][-1]:
            place = f"{place}.{part}" if place else str(part)
    param = place.partition(".")[0].partition("[")[0] or None
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return bad_request(f"`{_shown(place)}` is missing", param=param, code="missing_parameter")
    if error["type"] == "extra_forbidden":
        return bad_request(f"unknown field `{_shown(place)}`", param=param, code="unknown_parameter")
    if not place:
        named = message.partition(" ")[0]
        return bad_request(message, param=named if named in data else None, code="invalid_value")
    return bad_request(f"`{_shown(place)}`: {message} (got {_shown(here)})", param=param, code="invalid_value")


def _shown(value: object) -> str:
    """For a message: short, and without reading all of what is long."""
    if isinstance(value, str):
        text = value[: _SHOWN_CHARS + 1]
    elif isinstance(value, list | dict):
        text = f"{type(value).__name__} of {len(value)}"
    else:
        text = repr(value)[: _SHOWN_CHARS + 1]
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
