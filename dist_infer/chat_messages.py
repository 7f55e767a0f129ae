"""A conversation as people give it, checked and made plain: what a chat template may be asked to write."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from partition.errors import ConfigError

Message: TypeAlias = Mapping[str, Any]
Messages: TypeAlias = Sequence[Message]
Tools: TypeAlias = Sequence[Mapping[str, Any]]
Documents: TypeAlias = Sequence[Mapping[str, Any]]

MAX_MESSAGES = 65_536
MAX_TOOLS = 4096
MAX_DOCUMENTS = 4096
_MAX_ROLE_CHARS = 64
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_TEXT_KEYS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Plain JSON values, its own copy. In `messages` every content is one text, or None beside tool_calls where it was
    given so: some templates ask for it. Other keys that were None are left out.

    `tools` and `documents` are None when none were given: templates ask whether they are.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None


def make_conversation(
    messages: Messages, tools: Tools | None = None, documents: Documents | None = None
) -> Conversation:
    """Raises ConfigError with the place, what is there and what is allowed."""
    if not _is_list(messages):
        raise ConfigError(f"messages must be a list of {{role, content}} objects, not {_shown(messages)}")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise ConfigError(f"a conversation has 1 to {MAX_MESSAGES} messages, not {len(messages)}")
    return Conversation(
        messages=[_message(f"messages[{index}]", message) for index, message in enumerate(messages)],
        tools=_objects("tools", tools, MAX_TOOLS, "write a function as its JSON Schema"),
        documents=_objects("documents", documents, MAX_DOCUMENTS, "e.g. {title, text}"),
    )


def _message(place: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(f"{place} must be an object with role and content, not {_shown(message)}")
    for key in message:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(_KEYS)}"
            raise ConfigError(f"{place} has an unknown key {_shown(key)}; {hint}")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if not isinstance(role, str) or not 0 < len(role) <= _MAX_ROLE_CHARS:
        raise ConfigError(f"{place}.role must be a text such as user, assistant or system, not {_shown(role)}")
    if "content" in given:
        given["content"] = _content(f"{place}.content", given["content"])
    elif given.get("tool_calls") and "content" in message:
        given["content"] = None
    elif not given.get("tool_calls"):
        raise ConfigError(f"{place} has no content: only a message with tool_calls may be without")
    for key in _TEXT_KEYS:
        if key in given and not isinstance(given[key], str):
            raise ConfigError(f"{place}.{key} must be a text, not {_shown(given[key])}")
    if "tool_calls" in given:
        given["tool_calls"] = _objects(f"{place}.tool_calls", given["tool_calls"], MAX_TOOLS, "{type, function}")
    return given


def _content(place: str, content: object) -> str:
    """Parts of a text are one text: most templates know no parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not _is_list(content):
        raise ConfigError(f"{place} must be a text or a list of text parts, not {_shown(content)}")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise ConfigError(
                f"{place}[{index}] must be {{type: text, text: ...}}, not {_shown(part)}: only text can be given"
            )
        texts.append(text)
    return "".join(texts)


def _objects(place: str, given: object, most: int, hint: str) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    if not isinstance(given, Sequence) or not _is_list(given):
        raise ConfigError(f"{place} must be a list of JSON objects, not {_shown(given)}")
    if len(given) > most:
        raise ConfigError(f"{place} has {len(given)} entries, more than the {most} that are allowed")
    for index, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise ConfigError(f"{place}[{index}] must be a JSON object, not {_shown(item)}: {hint}")
    try:
        plain: list[dict[str, Any]] = json.loads(json.dumps([dict(item) for item in given], allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: only what JSON can say can be in it: {error}") from None
    return plain


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
