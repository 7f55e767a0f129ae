"""A checked request to prompts and SamplingParams. Slow parts (tokenizer, template) run in a thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

from dist_infer.openai.errors import bad_request
from dist_infer.openai.service import Engine, Ticket, check_length
from dist_infer.openai.types import ChatRequest, CompletionRequest, Sampled
from dist_infer.sampling_params import SamplingParams

N = TypeVar("N", int, float)
FIELDS = frozenset(ChatRequest.model_fields) | frozenset(CompletionRequest.model_fields)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the engine is asked: each prompt with the same params."""

    prompts: list[tuple[str | None, list[int]]]
    params: SamplingParams

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
    text, ids = ticket.ready.engine.chat_prompt(
        [message.plain() for message in request.messages],
        documents=request.documents,
        add_generation_prompt=bool(request.add_generation_prompt),
        continue_final_message=bool(request.continue_final_message),
    )
    check_length(ticket, ids, params)
    return Ask(prompts=[(text, ids)], params=params)


def ask_completion(request: CompletionRequest, params: SamplingParams, ticket: Ticket) -> Ask:
    """All prompts are checked before the first is given to the engine."""
    engine = ticket.ready.engine
    prompts = [_encoded(engine, prompt) for prompt in _listed(request)]
    for _, ids in prompts:
        check_length(ticket, ids, params)
    return Ask(prompts=prompts, params=params)


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
