"""What the OpenAPI document says of routes whose bodies the framework does not read."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON; the last one is [DONE]"}},
}
_STATUSES = {
    400: "The request is wrong; `param` names the field",
    401: "No key, or one that is not known",
    403: "A key that may only read the metrics",
    404: "No such model or route",
    405: "Another method",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not application/json, or compressed",
    429: "The queue is full, or this key's limit; Retry-After",
    500: "An error of the server's own",
    503: "Loading, draining or failed; Retry-After",
    504: "The deadline has passed",
}


def answers_of(*, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """200 and every error, in the one shape. streams: the answer may come as events."""
    found: dict[int | str, dict[str, Any]] = {200: {"description": "The answer"}}
    if streams:
        found[200]["content"] = {"application/json": {}, "text/event-stream": {"schema": _EVENT}}
    for status, what in _STATUSES.items():
        found[status] = {"description": what, "content": {"application/json": {"schema": _ERROR}}}
    return found


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """The request's JSON Schema with its definitions inside, since the framework does not collect them."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolved(definitions[value["$ref"].rpartition("/")[2]])
            return {key: resolved(item) for key, item in value.items()}
        return [resolved(item) for item in value] if isinstance(value, list) else value

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": resolved(schema)}}}}
