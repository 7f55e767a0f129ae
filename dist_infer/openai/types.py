"""The requests of the endpoint. Unknown fields are errors; a field that is here works.

Values are checked here for their type and for how many there are; what is in range is `SamplingParams`' to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, WithJsonSchema, model_validator

from dist_infer.grammar import MAX_CHOICES
from dist_infer.openai.tools.requested import MAX_TOOLS
from dist_infer.sampling_params import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SAMPLES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
)

MAX_PROMPTS = 128
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_PRIORITY = 1000
_MAX_USER_CHARS = 256

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
_NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
_Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
_BiasKey = Annotated[str, Field(pattern=r"^\d{1,10}$")]
_Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]

_Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
_Object = dict[str, JsonValue]
_Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


def _described(**schema: Any) -> WithJsonSchema:
    """For the OpenAPI document, where what is checked is checked in more words than types have."""
    return WithJsonSchema(schema)


_FUNCTION = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
_Tools = Annotated[
    list[_Object],
    Field(max_length=MAX_TOOLS, fail_fast=True),
    _described(
        type="array",
        maxItems=MAX_TOOLS,
        items={
            "type": "object",
            "required": ["type", "function"],
            "additionalProperties": False,
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "required": ["name"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
                        "description": {"type": ["string", "null"]},
                        "parameters": {"type": ["object", "null"], "description": "JSON Schema of the arguments."},
                        "strict": {"type": ["boolean", "null"], "description": "Arguments always fit the schema."},
                    },
                },
            },
        },
    ),
]
_ToolChoice = Annotated[
    str | _Object,
    _described(
        anyOf=[
            {"enum": ["auto", "none", "required"]},
            {
                "type": "object",
                "required": ["type", "function"],
                "properties": {"type": {"const": "function"}, "function": _FUNCTION},
            },
        ]
    ),
]
_ResponseFormat = Annotated[
    _Object,
    _described(
        type="object",
        required=["type"],
        properties={
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {
                "type": "object",
                "required": ["name", "schema"],
                "properties": {
                    "name": {"type": "string"},
                    "schema": {"type": "object"},
                    "strict": {"type": ["boolean", "null"], "description": "The schema is kept in any case."},
                },
            },
        },
    ),
]


class Strict(BaseModel):
    """No unknown fields, no conversions; NaN and infinities are no numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    include_usage: bool | None = Field(None, description="A last chunk with the usage of the whole request.")


class StructuredOutputs(Strict):
    """What the whole answer must be: one of these."""

    json_: str | _Object | None = Field(None, alias="json", description="A JSON Schema.")
    json_object: Literal[True] | None = None
    regex: Text | None = None
    choice: _Choices | None = None
    grammar: Text | None = Field(None, description="In llguidance's Lark dialect.")


class Sampled(Strict):
    """What both ways of asking for text have in common; docs/sampling.md says what each does."""

    model: str | None = Field(None, max_length=256, description="The served model's name; left out: that one.")
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    repetition_penalty: Annotated[float, Field(ge=1 / MAX_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = 1.0
    presence_penalty: _Penalty | None = 0.0
    frequency_penalty: _Penalty | None = 0.0
    logit_bias: Annotated[dict[_BiasKey, _Bias], Field(max_length=MAX_LOGIT_BIASES)] | None = None
    bad_words: Annotated[list[_BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = 0
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    prompt_logprobs: _NumLogprobs | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    ignore_eos: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    guided_json: str | _Object | None = Field(None, description="A JSON Schema that the answer fits.")
    guided_regex: Text | None = None
    guided_choice: _Choices | None = None
    guided_grammar: Text | None = Field(None, description="In llguidance's Lark dialect.")
    structured_outputs: StructuredOutputs | None = Field(None, description="The newer way to say one of these.")
    priority: _Priority | None = Field(None, description="Lower is sooner; 0, or the key's own, when left out.")
    user: str | None = Field(None, max_length=_MAX_USER_CHARS, description="For the access log alone.")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for a stream: set stream to true")
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """One of a conversation. Only text can be given. `refusal` and what follows it: null, as answers have them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[_Object], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    def plain(self) -> dict[str, Any]:
        """As `LLM.chat_prompt` takes it."""
        return self.model_dump(exclude_none=True)


class ChatRequest(Sampled):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The older name of the next one.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="None: to the model's length.")
    logprobs: bool | None = False
    top_logprobs: _NumLogprobs | None = Field(None, description="Needs logprobs.")
    tools: _Tools | None = None
    tool_choice: _ToolChoice | None = Field(None, description="Left out: auto with tools.")
    parallel_tool_calls: bool | None = Field(True, description="False: one call at most.")
    response_format: _ResponseFormat | None = None
    include_reasoning: bool | None = Field(True, description="False: the thought before the answer is not sent.")
    documents: Annotated[list[dict[str, JsonValue]], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False

    @model_validator(mode="after")
    def _one_of_two(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_completion_tokens and max_tokens are two names of one number: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(Sampled):
    """POST /v1/completions"""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(16, description="0 is for echo: the prompt alone.")
    logprobs: _NumLogprobs | None = None
    echo: bool | None = False

    @model_validator(mode="after")
    def _nothing_needs_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, so there would be nothing to answer: it is for echo: true")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize"""

    model: str | None = Field(None, max_length=256)
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(None, description="With prompt; true when left out.")
    add_generation_prompt: bool | None = Field(None, description="With messages; true when left out.")
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of the two")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens is for prompt: a chat template writes them itself")
        if self.prompt is not None and self.add_generation_prompt is not None:
            raise ValueError("add_generation_prompt is for messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize"""

    model: str | None = Field(None, max_length=256)
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


# Fields that people send and that are refused: why, where "unknown field" would not say enough.
REFUSED: Mapping[str, str] = {
    "chat_template": "chat templates are the server's alone",
    "chat_template_kwargs": "chat templates are the server's alone",
    "suffix": "text cannot be put before a suffix with this kind of model",
    "modalities": "only text goes in and out",
    "audio": "only text goes in and out",
    "functions": "the older form of tools is not supported",
    "function_call": "the older form of tools is not supported",
    "store": "nothing is stored",
    "guided_whitespace_pattern": "between the parts of JSON stands what docs/constrained.md says",
    "guided_decoding_backend": "there is one",
    "reasoning_effort": "how long this model thinks cannot be set",
    "use_beam_search": "there is no beam search: best_of computes several answers and gives the likeliest",
}
