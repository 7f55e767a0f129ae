"""A file of prompts, one JSON object a line, read before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, JsonValue, ValidationError, model_validator

from dist_infer.config_errors import explain
from dist_infer.config_types import Section
from dist_infer.prompt_config import ChatPrompt, Messages, Prompt
from partition.errors import ConfigError

MAX_LINE_BYTES = 8 << 20


class PromptLine(Section):
    """`prompt`, a text; or `messages`, with or without `tools` and `documents`."""

    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Messages | None = None
    tools: list[dict[str, JsonValue]] | None = None
    documents: list[dict[str, JsonValue]] | None = None

    @model_validator(mode="after")
    def _is_one_of_them(self) -> PromptLine:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a line has `prompt` (a text) or `messages`, one of the two")
        if self.prompt is not None and (self.tools is not None or self.documents is not None):
            raise ValueError("`tools` and `documents` go with `messages`: a plain `prompt` knows neither")
        return self


def read_prompts(path: str | Path) -> list[Prompt]:
    """Every line's prompt; blank lines are skipped.

    Raises ConfigError with the line's number: no such file, a line that is no such object, none at all, or a line of
    more than MAX_LINE_BYTES. Peak memory: the prompts and one line.
    """
    prompts: list[Prompt] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if line.strip():
                    prompts.append(_prompt(f"{path}:{number}", line))
    except FileNotFoundError:
        raise ConfigError(f"no prompts file at {path}: run.prompts_file is the path of a JSONL file") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read the prompts file {path}: {error}") from error
    if not prompts:
        raise ConfigError(f'{path} holds no prompt: write one JSON object a line, e.g. {{"prompt": "Hello"}}')
    return prompts


def _prompt(place: str, line: bytes) -> Prompt:
    if len(line) > MAX_LINE_BYTES:
        raise ConfigError(f"{place}: the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        read = PromptLine.model_validate_json(line)
    except ValidationError as error:
        raise ConfigError(f"{place}: {explain(error, PromptLine)}") from None
    if read.messages is None:
        return str(read.prompt)
    return ChatPrompt(messages=read.messages, tools=read.tools, documents=read.documents)
