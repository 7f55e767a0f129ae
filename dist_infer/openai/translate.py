"""A checked request to prompts and SamplingParams. Slow parts (tokenizer, template) run in a thread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar, cast

from dist_infer.grammar import Grammar
from dist_infer.openai.constraints import Constraint, as_grammar, both_constrain, made, read_constraint
from dist_infer.openai.conversation import plain_messages
from dist_infer.openai.dialect import Dialect
from dist_infer.openai.errors import bad_request
from dist_infer.openai.service import Engine, Service, Ticket, check_length
from dist_infer.openai.tools import (
    AnswerParser,
    FieldError,
    Reasoning,
    Tool,
    ToolChoice,
    ToolFormat,
    behind_thought,
    call_grammar,
    read_choice,
    read_tools,
)
from dist_infer.openai.types import ChatRequest, CompletionRequest, Sampled
from dist_infer.sampling_params import SamplingParams
from partition.errors import ConfigError

N = TypeVar("N", int, float)
FIELDS = frozenset(ChatRequest.model_fields) | frozenset(CompletionRequest.model_fields)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the answer's text is read: calls of these tools in this format, behind this thought.

    is_forced: it is calls, and nothing else but the thought.
    """

    format: ToolFormat | None
    tools: tuple[str, ...]
    parallel: bool
    thought: Reasoning | None
    is_forced: bool

    def parser(self) -> AnswerParser:
        """For one answer."""
        return AnswerParser(self.format, self.tools, parallel=self.parallel, reasoning=self.thought)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the engine is asked: each prompt with the same params.

    constrained_by: the field that the params' grammar is from. reading: None for text that is what it is.
    priority: lower is sooner.
    """

    prompts: list[tuple[str | None, list[int]]]
    params: SamplingParams
    constrained_by: str | None = None
    reading: Reading | None = None
    priority: int = 0

    def explained(self, error: Exception) -> Exception:
        """What the grammar did wrong, with the field that it is from."""
        if self.constrained_by is None or not isinstance(error, ConfigError) or isinstance(error, FieldError):
            return error
        field = self.constrained_by
        return bad_request(f"`{field}`: {error}", param=field, code="invalid_grammar")

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(ids) for _, ids in self.prompts)


def chat_params(request: ChatRequest) -> SamplingParams:
    """ConfigError with the field, for what the types alone do not show."""
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(request, max_tokens, logprobs, request.prompt_logprobs)


def completion_params(request: CompletionRequest) -> SamplingParams:
    """With echo, the prompt's log-probabilities are part of the answer's. max_tokens 0 computes one, not shown."""
    of_prompt = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        of_prompt = max(request.logprobs, of_prompt or 0)
    max_tokens = 1 if request.max_tokens == 0 else request.max_tokens
    return _params(request, max_tokens, request.logprobs, of_prompt)


def num_prompts(request: CompletionRequest) -> int:
    if isinstance(request.prompt, str) or isinstance(request.prompt[0], int):
        return 1
    return len(request.prompt)


def ask_chat(request: ChatRequest, params: SamplingParams, ticket: Ticket) -> Ask:
    """Raises ConfigError, ApiError: 400 for a conversation that the template refuses or that is too long."""
    if request.continue_final_message and request.add_generation_prompt:
        raise bad_request(
            "continue_final_message goes on with the last message: give add_generation_prompt: false with it",
            param="continue_final_message",
        )
    dialect = ticket.ready.dialect
    constraint = read_constraint(request)
    tools = read_tools(request.tools)
    choice = read_choice(request.tool_choice, tools)
    if choice.mode != "none" and dialect.tool_format is None:
        raise FieldError("tools", "cannot be used: this model was taught no calls that can be read (run.tool_format)")
    if choice.mode != "none" and constraint is not None:
        raise both_constrain("tools", constraint.field)
    text, ids = ticket.ready.engine.chat_prompt(
        plain_messages(request.messages, dialect),
        tools=request.tools if choice.mode != "none" else None,
        documents=request.documents,
        add_generation_prompt=bool(request.add_generation_prompt),
        continue_final_message=bool(request.continue_final_message),
    )
    check_length(ticket, ids, params)
    reading = _reading(request, text, tools, choice, dialect, constraint)
    if reading is not None and choice.mode != "none":
        constraint = _calls(reading, tools, choice, dialect)
    elif reading is not None and constraint is not None:
        constraint = _behind_thought(constraint, reading, dialect)
    if reading is not None:
        params = replace(params, kept_special_token_ids=dialect.kept(reading.format, reading.thought))
    return _constrained(Ask(prompts=[(text, ids)], params=params, reading=reading), constraint)


def ask_completion(request: CompletionRequest, params: SamplingParams, ticket: Ticket) -> Ask:
    """All prompts are checked before the first is given to the engine."""
    engine = ticket.ready.engine
    constraint = read_constraint(request)
    prompts = [_encoded(engine, prompt) for prompt in _listed(request)]
    for _, ids in prompts:
        check_length(ticket, ids, params)
    return _constrained(Ask(prompts=prompts, params=params), constraint)


async def check_constraint(service: Service, ticket: Ticket, ask: Ask) -> None:
    """ApiError 400 with the field for a grammar that cannot be used; 429 when too many wait to be tried out."""
    if ask.constrained_by is None:
        return
    try:
        await service.check_grammar(ticket, ask.prompts[0][1], ask.params)
    except ConfigError as error:
        raise ask.explained(error) from None


def _constrained(ask: Ask, constraint: Constraint | None) -> Ask:
    if constraint is None:
        return ask
    params = replace(ask.params, grammar=constraint.grammar)
    return replace(ask, params=params, constrained_by=constraint.field)


def _reading(
    request: ChatRequest,
    prompt: str,
    tools: tuple[Tool, ...],
    choice: ToolChoice,
    dialect: Dialect,
    constraint: Constraint | None,
) -> Reading | None:
    """None where the text of an answer is nothing but its content."""
    # a grammar of the client's own is the whole answer: there is no room for a thought
    thought = None if constraint is not None and constraint.grammar.kind == "lark" else dialect.thought(prompt)
    if choice.mode == "none" and thought is None:
        return None
    return Reading(
        format=None if choice.mode == "none" else dialect.tool_format,
        tools=tuple(tool.name for tool in tools if choice.mode != "none" and choice.name in (None, tool.name)),
        parallel=request.parallel_tool_calls is not False,
        thought=thought,
        is_forced=choice.mode in ("required", "named"),
    )


def _calls(reading: Reading, tools: tuple[Tool, ...], choice: ToolChoice, dialect: Dialect) -> Constraint | None:
    """tool_choice as a constraint; None when the answer may be anything."""
    if reading.format is None:
        raise RuntimeError("calls without a format")
    field = "tools" if choice.mode == "auto" else "tool_choice"
    special, thought = dialect.special_token_ids, reading.thought
    text = call_grammar(tools, choice, reading.format, reading.parallel, special_token_ids=special, reasoning=thought)
    grammar = None if text is None else made(field, lambda: as_grammar(text))
    return None if grammar is None else Constraint(field=field, grammar=grammar)


def _behind_thought(constraint: Constraint, reading: Reading, dialect: Dialect) -> Constraint:
    if reading.thought is None:
        return constraint
    thought, grammar = reading.thought, constraint.grammar

    def make() -> Grammar:
        return behind_thought(grammar, thought, dialect.special_token_ids)

    return replace(constraint, grammar=made(constraint.field, make) or grammar)


def _listed(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(cast(list[str | list[int]], prompt))


def _encoded(engine: Engine, prompt: str | list[int]) -> tuple[str | None, list[int]]:
    return (prompt, engine.encode(prompt)) if isinstance(prompt, str) else (None, prompt)


def _params(
    request: Sampled, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """A field that is null is a field that was left out."""
    bias = request.logit_bias or {}
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(request.temperature, 1.0),
        top_k=_or(request.top_k, 0),
        top_p=_or(request.top_p, 1.0),
        seed=request.seed,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        min_p=_or(request.min_p, 0.0),
        typical_p=_or(request.typical_p, 1.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias={int(token): value for token, value in bias.items()},
        bad_words=request.bad_words,
        min_tokens=_or(request.min_tokens, 0),
        n=_or(request.n, 1),
        best_of=request.best_of,
        prompt_logprobs=prompt_logprobs,
    )


def _or(value: N | None, default: N) -> N:
    return default if value is None else value
