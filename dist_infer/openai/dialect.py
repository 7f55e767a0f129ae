"""How the model that is served writes calls and thoughts, found once from its chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from dist_infer.openai.tools import (
    FormatName,
    Reasoning,
    ReasoningName,
    ToolFormat,
    detect_format,
    detect_reasoning,
    find_format,
)

ToolSetting: TypeAlias = Literal["auto", "none"] | FormatName
ReasoningSetting: TypeAlias = Literal["auto", "none"] | ReasoningName

_WRITES_JSON = re.compile(r"arguments['\"\]]*\s*\|\s*tojson")
_WRITES_TEXT = re.compile(r"(\+|~|\{\{-?)\s*[\w.\[\]'\"]*arguments['\"\]]*\s*(\+|~|-?\}\})")
_ASKS_FOR_NONE = re.compile(r"content['\"\]]*\s+is\s+(not\s+)?none")


class Described(Protocol):
    """What must be known of a model."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def special_token_ids(self) -> Mapping[str, int]: ...
    @property
    def model_type(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """tool_format: None for a model that was taught no calls which we can read. template: None without one.

    special_token_ids: of the tokenizer's special tokens, by their text.
    """

    template: str | None = None
    tool_format: ToolFormat | None = None
    reasoning: ReasoningSetting = "auto"
    special_token_ids: Mapping[str, int] = field(default_factory=dict)

    def thought(self, prompt: str) -> Reasoning | None:
        """The tags of the thought that may come before the answer to this prompt."""
        if self.reasoning == "none":
            return None
        return detect_reasoning(self.template or "", prompt, None if self.reasoning == "auto" else self.reasoning)

    def kept(self, format: ToolFormat | None, thought: Reasoning | None) -> tuple[int, ...]:
        """Special tokens that a parser looks for, and that would be lost if they were left out of the text."""
        markers = (*(format.markers if format else ()), *((thought.open, thought.close) if thought else ()))
        return tuple(self.special_token_ids[text] for text in markers if text in self.special_token_ids)

    @property
    def takes_arguments_as_text(self) -> bool:
        """Whether the template joins a call's arguments to its text as they are; most write an object as JSON."""
        template = self.template or ""
        return bool(_WRITES_TEXT.search(template)) and not _WRITES_JSON.search(template)

    @property
    def content_of_calls(self) -> str | None:
        """What stands for the content of a message that has calls alone: most templates want a text to join."""
        return None if _ASKS_FOR_NONE.search(self.template or "") else ""


def find_dialect(model: Described, tools: ToolSetting = "auto", reasoning: ReasoningSetting = "auto") -> Dialect:
    """tools, reasoning: `run.tool_format` and `run.reasoning_format`."""
    template = model.chat_template
    if tools == "auto":
        found = None if template is None else detect_format(template, model.model_type)
    else:
        found = None if tools == "none" else find_format(tools)
    return Dialect(
        template=template, tool_format=found, reasoning=reasoning, special_token_ids=dict(model.special_token_ids)
    )
