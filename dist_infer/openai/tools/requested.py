"""`tools` and `tool_choice` of a request, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dist_infer.openai.tools.errors import FieldError
from dist_infer.openai.tools.schema_check import check_name, check_schema

MAX_TOOLS = 128
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")
_MODES: tuple[Literal["auto", "none", "required"], ...] = ("auto", "none", "required")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON Schema of an object."""

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """`name` is the one function to call when the mode is "named"."""

    mode: Literal["auto", "none", "required", "named"]
    name: str | None = None


def read_tools(tools: object) -> tuple[Tool, ...]:
    """None and an empty list are no tools. Raises FieldError with the place."""
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise FieldError("tools", f"must be a list, not {type(tools).__name__}")
    if len(tools) > MAX_TOOLS:
        raise FieldError("tools", f"has {len(tools)} entries, more than the {MAX_TOOLS} allowed")
    read = tuple(_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools))
    names = [tool.name for tool in read]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise FieldError(f"tools[{index}].function.name", f"{name!r} is given twice")
    return read


def read_choice(choice: object, tools: Sequence[Tool]) -> ToolChoice:
    """Left out it is auto with tools and none without. Raises FieldError."""
    if choice is None:
        return ToolChoice(mode="auto" if tools else "none")
    if isinstance(choice, str):
        for mode in _MODES:
            if choice == mode:
                if not tools and mode == "required":
                    raise FieldError("tool_choice", "is required, and there are no tools: give some")
                return ToolChoice(mode=mode if tools else "none")
        raise FieldError("tool_choice", f"is {choice[:80]!r}; there are {', '.join(_MODES)} and a named function")
    if not isinstance(choice, Mapping) or choice.get("type") != "function" or set(choice) != {"type", "function"}:
        raise FieldError("tool_choice", 'must be a text, or {"type": "function", "function": {"name": ...}}')
    function = choice["function"]
    if not isinstance(function, Mapping) or set(function) != {"name"}:
        raise FieldError("tool_choice.function", 'must be {"name": ...}')
    name = check_name("tool_choice.function.name", function["name"])
    if name not in [tool.name for tool in tools]:
        raise FieldError("tool_choice.function.name", f"is {name!r}, which is none of `tools`")
    return ToolChoice(mode="named", name=name)


def _tool(place: str, tool: object) -> Tool:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
        raise FieldError(place, 'must be {"type": "function", "function": {...}}')
    for key in tool:
        if key not in ("type", "function"):
            raise FieldError(f"{place}.{key}"[:200], "is not known; there are type and function")
    function = tool["function"]
    place = f"{place}.function"
    for key in function:
        if key not in _FUNCTION_KEYS:
            raise FieldError(f"{place}.{key}"[:200], f"is not known; there are {', '.join(_FUNCTION_KEYS)}")
    description, strict = function.get("description"), function.get("strict")
    if not isinstance(description, str | None):
        raise FieldError(f"{place}.description", "must be a text")
    if not isinstance(strict, bool | None):
        raise FieldError(f"{place}.strict", "must be true or false")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    checked = check_schema(f"{place}.parameters", parameters)
    if checked.setdefault("type", "object") != "object":
        raise FieldError(f"{place}.parameters.type", f"is {checked['type']!r:.80}: arguments are an object")
    return Tool(
        name=check_name(f"{place}.name", function.get("name")),
        description=description,
        parameters=checked,
        strict=bool(strict),
    )
