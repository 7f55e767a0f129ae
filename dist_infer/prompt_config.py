"""A prompt as people write it: a text, chat messages, or a conversation with tools or documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from dist_infer.config_types import Section


class TextPart(Section):
    """A part of a message's content. Only text can be given."""

    type: Literal["text"] = Field("text", description="Kind of the part.")
    text: str = Field(description="Parts are joined as they are.")


class Message(Section):
    """One chat message."""

    role: str = Field(min_length=1, max_length=64, description="Who speaks: system, user, assistant, tool, …")
    content: str | list[TextPart] | None = Field(None, description="Needed, unless there are tool_calls.")
    name: str | None = Field(None, description="Of the tool that answers, or of the speaker.")
    tool_calls: list[dict[str, JsonValue]] | None = Field(
        None, description="Calls the assistant made: {type: function, function: {name, arguments: {...}}}."
    )
    tool_call_id: str | None = Field(None, description="The call that a tool's message answers.")
    reasoning_content: str | None = Field(None, description="What the assistant thought, where the template shows it.")
    reasoning: str | None = Field(None, description="The same, by the name that other templates know.")
    thinking: str | None = Field(None, description="The same, by the name that other templates know.")

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content (only one with tool_calls may be without)")
        return self


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatPrompt(Section):
    """A conversation with tools or documents, for templates that know them."""

    messages: Messages = Field(description="The conversation.")
    tools: list[dict[str, JsonValue]] | None = Field(None, description="Functions the model may call, as JSON Schemas.")
    documents: list[dict[str, JsonValue]] | None = Field(
        None, description="What the answer may draw on, e.g. {title, text}."
    )


def _prompt_kind(value: Any) -> str | None:
    kinds = ((str, "text"), (list, "messages"), (Mapping, "chat"), (ChatPrompt, "chat"))
    return next((kind for type_, kind in kinds if isinstance(value, type_)), None)


Prompt = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")]
    | Annotated[Messages, Tag("messages")]
    | Annotated[ChatPrompt, Tag("chat")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_kind",
        custom_error_message="a prompt is a text, a list of messages, or an object with messages, tools, documents",
    ),
]
