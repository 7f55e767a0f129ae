"""Events of the engine as server-sent events, or as one body."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from dist_infer.metrics.request_times import AnswerTimes
from dist_infer.openai.answering import Answering
from dist_infer.openai.answers import prompt_logprobs, usage
from dist_infer.openai.errors import ApiError
from dist_infer.openai.service import Service, Ticket
from dist_infer.openai.translate import Ask
from dist_infer.outputs import Event, Failed, Finished, TokenEvent

DONE = b"data: [DONE]\n\n"


@dataclass(kw_only=True)
class Counts:
    """Of one request, for the access log; filled while it runs."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    times: AnswerTimes | None = None
    user: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float | None:
        return None if self.times is None else self.times.ttft_s


def event_bytes(data: Any) -> bytes:
    return b"data: " + json.dumps(data, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def error_bytes(error: ApiError) -> bytes:
    """How a stream ends that had begun when it went wrong."""
    return b"data: " + error.body() + b"\n\n" + DONE


def _head(service: Service, answering: Answering, kind: str) -> dict[str, Any]:
    return {
        "id": f"{answering.id_prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(service.wall_clock()),
        "model": service.model_name,
    }


def _events(
    service: Service, ticket: Ticket, ask: Ask, answering: Answering
) -> AsyncGenerator[list[tuple[int, Event]], None]:
    return service.events(ticket, ask.prompts, ask.params, priority=ask.priority, is_enough=answering.is_enough)


async def chunks(
    service: Service, ticket: Ticket, ask: Ask, answering: Answering, counts: Counts, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """All chunks up to [DONE], as many in one piece as there are. Raises what fails the request; close it to abort."""
    head = _head(service, answering, answering.chunk_object)

    def chunk(choices: list[dict[str, Any]]) -> bytes:
        return event_bytes({**head, "choices": choices, **({"usage": None} if include_usage else {})})

    opened: set[int] = set()
    async with aclosing(_events(service, ticket, ask, answering)) as batches:
        async for batch in batches:
            out: list[bytes] = []
            for prompt, event in batch:
                if isinstance(event, Failed):
                    raise ask.explained(event.error) from event.error
                if prompt not in opened:
                    opened.add(prompt)
                    out += [chunk([choice]) for choice in answering.openings(prompt, None)]
                if isinstance(event, TokenEvent):
                    out += [chunk([choice]) for choice in answering.pieces(prompt, event)]
                elif isinstance(event, Finished):
                    counts.num_output_tokens += answering.num_output_tokens(event.output)
                    out += [chunk([choice]) for choice in answering.ends(prompt, event.output)]
            if out:
                yield b"".join(out)
    if include_usage:
        total = usage(counts.num_prompt_tokens, counts.num_output_tokens)
        yield event_bytes({**head, "choices": [], "usage": total})
    yield DONE


async def body(service: Service, ticket: Ticket, ask: Ask, answering: Answering, counts: Counts) -> bytes:
    """The answer in one piece. Raises what fails the request."""
    head = _head(service, answering, answering.body_object)
    choices: list[dict[str, Any]] = []
    extra: dict[str, Any] = {}
    async with aclosing(_events(service, ticket, ask, answering)) as batches:
        async for batch in batches:
            for prompt, event in batch:
                if isinstance(event, Failed):
                    raise ask.explained(event.error) from event.error
                if isinstance(event, TokenEvent):
                    answering.note(prompt, event)
                elif isinstance(event, Finished):
                    counts.num_output_tokens += answering.num_output_tokens(event.output)
                    choices += answering.whole(prompt, event.output)
                    if answering.body_object == "chat.completion" and ask.params.prompt_logprobs is not None:
                        extra["prompt_logprobs"] = prompt_logprobs(event.output)
    choices.sort(key=lambda choice: int(choice["index"]))
    total = usage(counts.num_prompt_tokens, counts.num_output_tokens)
    return json.dumps({**head, "choices": choices, "usage": total, **extra}, allow_nan=False).encode()
