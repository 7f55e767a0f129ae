"""A conversation as clients send it to the one that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dist_infer.openai.dialect import Dialect
from dist_infer.openai.tools import FieldError
from dist_infer.openai.types import Message

_CALL_KEYS = ("id", "type", "function", "index")
_FUNCTION_KEYS = ("name", "arguments")


def plain_messages(messages: Sequence[Message], dialect: Dialect) -> list[dict[str, Any]]:
    """As `LLM.chat_prompt` takes them. Raises FieldError with the place.

    OpenAI's clients send a call's arguments as a text that holds JSON; most templates write an object as JSON and would
    quote a text once more; some join them to their own text as they are.
    """
    as_text = dialect.takes_arguments_as_text
    found = []
    for number, message in enumerate(messages):
        plain = message.plain()
        if message.tool_calls:
            plain.setdefault("content", dialect.content_of_calls)
            if message.role != "assistant":
                raise FieldError(f"messages[{number}].tool_calls", "is an assistant's: only a model calls tools")
            place = f"messages[{number}].tool_calls"
            plain["tool_calls"] = [
                _call(f"{place}[{index}]", call, as_text) for index, call in enumerate(message.tool_calls)
            ]
        found.append(plain)
    return found


def _call(place: str, call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise FieldError(place, 'must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}')
    for where, there, known in ((place, call, _CALL_KEYS), (f"{place}.function", function, _FUNCTION_KEYS)):
        if unknown := [key for key in there if key not in known]:
            raise FieldError(f"{where}.{unknown[0]}"[:200], f"is not known; there are {', '.join(known)}")
    if not isinstance(call.get("id", ""), str):
        raise FieldError(f"{place}.id", "must be a text")
    if not isinstance(function.get("name"), str):
        raise FieldError(f"{place}.function.name", "must be a text")
    given = function.get("arguments") or "{}"
    arguments: object = _arguments(f"{place}.function.arguments", given)
    if as_text:
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    kept = {key: value for key, value in call.items() if key != "index"}
    return {**kept, "type": "function", "function": {**function, "arguments": arguments}}


def _arguments(place: str, given: object) -> dict[str, Any]:
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise FieldError(place, f"is no JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise FieldError(place, "must be a JSON object, or a text that holds one")
    return value
