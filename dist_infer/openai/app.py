"""The routes, as a FastAPI app over a Service. Bodies are read, bounded and checked here, not by the framework."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from dist_infer.metrics.exposition import CONTENT_TYPE
from dist_infer.openai.answering import Answering, ChatAnswering, CompletionAnswering
from dist_infer.openai.body import parse
from dist_infer.openai.canary import RECENT_S, Canary
from dist_infer.openai.conversation import plain_messages
from dist_infer.openai.errors import ApiError, deadline_passed, internal, not_found, translated
from dist_infer.openai.guard import Guard, Receive, Scope, Send
from dist_infer.openai.keys import KeyRing, priority_of
from dist_infer.openai.logs import log_failure
from dist_infer.openai.openapi import answers_of, body_of
from dist_infer.openai.service import Degraded, Draining, Failed, Loading, Ready, Service, Ticket
from dist_infer.openai.stream import Counts, body, chunks, error_bytes
from dist_infer.openai.tracing import RequestTracer
from dist_infer.openai.translate import (
    FIELDS,
    Ask,
    ask_chat,
    ask_completion,
    chat_params,
    check_constraint,
    completion_params,
    num_prompts,
)
from dist_infer.openai.types import ChatRequest, CompletionRequest, DetokenizeRequest, Sampled, TokenizeRequest
from dist_infer.openai.web_pages import add_web_pages
from dist_infer.sampling_params import SamplingParams
from partition.errors import ConfigError

_JSON = "application/json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the app needs beside the service. hosts: see Guard. origins: other sites whose pages may call it (CORS).

    canary_s: how long an engine may have been idle before a readiness probe asks it for a token.
    """

    keys: KeyRing
    hosts: tuple[str, ...] = ("*",)
    tracer: RequestTracer | None = None
    origins: tuple[str, ...] = ()
    canary_s: float = RECENT_S


def make_app(service: Service, settings: Settings) -> FastAPI:
    """An ASGI app; `service` stays its owner's to close."""
    app = FastAPI(title="dist-infer", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.router.redirect_slashes = False
    app.add_middleware(Guard, keys=settings.keys, hosts=settings.hosts, service=service, tracer=settings.tracer)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    canary = Canary(recent_s=settings.canary_s)

    @app.exception_handler(HTTPException)
    async def of_the_router(request: Request, error: HTTPException) -> Response:
        kind = "there is no such route" if error.status_code == 404 else str(error.detail)
        known = ApiError(error.status_code, kind, code="unknown_url" if error.status_code == 404 else None)
        return Response(known.body(), error.status_code, {**known.headers(), **(error.headers or {})}, _JSON)

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest), responses=answers_of(streams=True))
    async def chat(request: Request) -> Response:
        data = await _body(request, service)
        service.refuse_if_full(1)
        asked = parse(ChatRequest, data)
        _check_model(service, asked.model)
        params = _named(lambda: chat_params(asked))

        priority = priority_of(request.state.key, asked.priority)

        async def prepare(ticket: Ticket) -> tuple[Ask, Answering]:
            ask = await service.in_thread(ask_chat, asked, params, ticket)
            await check_constraint(service, ticket, ask)
            return replace(ask, priority=priority), ChatAnswering(asked, ask)

        return WhileConnected(lambda send: _answer(service, request, asked, params.num_samples, prepare, send))

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest), responses=answers_of(streams=True))
    async def completions(request: Request) -> Response:
        data = await _body(request, service)
        service.refuse_if_full(1)
        asked = parse(CompletionRequest, data)
        _check_model(service, asked.model)
        params = _named(lambda: completion_params(asked))

        priority = priority_of(request.state.key, asked.priority)

        async def prepare(ticket: Ticket) -> tuple[Ask, Answering]:
            ask = await service.in_thread(ask_completion, asked, params, ticket)
            await check_constraint(service, ticket, ask)
            return replace(ask, priority=priority), CompletionAnswering(asked, ask, ticket.ready.engine)

        num_answers = params.num_samples * num_prompts(asked)
        return WhileConnected(lambda send: _answer(service, request, asked, num_answers, prepare, send))

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest), responses=answers_of())
    async def tokenize(request: Request) -> Response:
        asked = parse(TokenizeRequest, await _body(request, service))
        _check_model(service, asked.model)
        ready = service.require_ready()
        return _json(await service.in_thread(_tokenized, asked, ready))

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest), responses=answers_of())
    async def detokenize(request: Request) -> Response:
        asked = parse(DetokenizeRequest, await _body(request, service))
        _check_model(service, asked.model)
        ready = service.require_ready()
        return _json({"prompt": await service.in_thread(ready.engine.decode, asked.tokens)})

    @app.get("/v1/models", responses=answers_of())
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", responses=answers_of())
    async def model(name: str) -> Response:
        _check_model(service, name)
        return _json(_model(service))

    @app.get("/metrics", responses=answers_of())
    async def metrics() -> Response:
        return Response(await service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/health", responses=answers_of())
    @app.get("/health/ready", responses=answers_of(), operation_id="ready")
    async def ready() -> Response:
        if isinstance(state := service.state, Ready):
            canary.look(state.engine)
        return _health(service, startup=False)

    @app.get("/health/startup", responses=answers_of())
    async def startup() -> Response:
        return _health(service, startup=True)

    @app.get("/health/live", responses=answers_of())
    async def live() -> Response:
        return _json({"status": "alive"})

    add_web_pages(app)
    return app


class _StalledError(Exception):
    """The client reads nothing."""


class WhileConnected(Response):
    """Sends what `work` sends, and cancels it as soon as the client has gone. For requests whose body has been read."""

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                continue

        work = asyncio.ensure_future(self._work(send))
        watch = asyncio.ensure_future(gone())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait((work, watch))
        if not work.cancelled():
            work.result()


async def _answer(
    service: Service,
    request: Request,
    asked: Sampled,
    num_answers: int,
    prepare: Callable[[Ticket], Awaitable[tuple[Ask, Answering]]],
    send: Send,
) -> None:
    """From admission to the last byte, within the deadline. Raises before the first byte, tells the stream after it."""
    counts: Counts = request.state.counts
    counts.user = asked.user
    has_begun = False

    async def write(data: bytes, *, more: bool) -> None:
        """A server that shows when its client reads nothing waits here; ours also cuts the connection itself."""
        message = {"type": "http.response.body", "body": data, "more_body": more}
        try:
            async with asyncio.timeout(service.limits.write_time):
                await send(message)
        except TimeoutError:
            raise _StalledError from None

    try:
        async with asyncio.timeout(service.limits.request_time):
            with service.admit(num_answers) as ticket:
                counts.times = ticket.times
                ask, answering = await prepare(ticket)
                counts.num_prompt_tokens = ask.num_prompt_tokens
                ticket.take_tokens(ask.num_prompt_tokens)
                if not asked.stream:
                    data = await body(service, ticket, ask, answering, counts)
                    has_begun = True
                    await _start(send, _JSON, len(data))
                    await write(data, more=False)
                    return
                stream = chunks(service, ticket, ask, answering, counts, include_usage=asked.includes_usage)
                async with aclosing(stream) as pieces:
                    async for piece in pieces:
                        if not has_begun:
                            has_begun = True
                            await _start(send, "text/event-stream; charset=utf-8", None)
                        await write(piece, more=True)
                await write(b"", more=False)
    except _StalledError:
        return  # without an end: the server closes such a connection
    except Exception as error:
        known = _known(error, request.state.request_id, service)
        if not has_begun or not asked.stream:
            raise known from error
        await write(error_bytes(known), more=False)


def _known(error: Exception, request_id: str, service: Service) -> ApiError:
    if isinstance(error, TimeoutError):
        return deadline_passed("the deadline of this request has passed")
    found = translated(error, FIELDS)
    if found is None:
        log_failure(request_id, error, with_text=service.log_prompts)
        return internal(request_id)
    return found


async def _start(send: Send, media_type: str, length: int | None) -> None:
    headers = [(b"content-type", media_type.encode())]
    if length is None:
        headers += [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
    else:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _body(request: Request, service: Service) -> bytes:
    """ApiError: 408 too slow, 413 too large, 415 no JSON or compressed."""
    limits = service.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _JSON:
        raise ApiError(415, f"the body must be sent as content-type {_JSON}", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "a compressed body is not accepted", code="unsupported_media_type")
    too_large = ApiError(413, f"the body may have {limits.max_body} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.max_body:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_time):
            async for part in request.stream():
                size += len(part)
                if size > limits.max_body:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.body_time:g} s", code="request_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before the end of its body") from None
    return b"".join(parts)


def _named(make: Callable[[], SamplingParams]) -> SamplingParams:
    try:
        return make()
    except ConfigError as error:
        known = translated(error, FIELDS)
        raise (error if known is None else known) from error


def _check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.model_name:
        raise not_found(
            f"there is no model {name[:80]!r} here, only {service.model_name!r}", param="model", code="model_not_found"
        )


def _tokenized(asked: TokenizeRequest, ready: Ready) -> dict[str, Any]:
    if asked.messages is not None:
        generates = True if asked.add_generation_prompt is None else asked.add_generation_prompt
        messages = plain_messages(asked.messages, ready.dialect)
        ids = ready.engine.chat_prompt(messages, add_generation_prompt=generates)[1]
    else:
        special = True if asked.add_special_tokens is None else asked.add_special_tokens
        ids = ready.engine.encode(asked.prompt or "", add_special_tokens=special)
    texts = {"token_strs": [ready.engine.decode([token]) for token in ids]} if asked.return_token_strs else {}
    return {"count": len(ids), "max_model_len": ready.max_model_len, "tokens": ids, **texts}


def _model(service: Service) -> dict[str, Any]:
    state = service.state
    state = state.ready if isinstance(state, Degraded) else state
    found = {"id": service.model_name, "object": "model", "created": service.created, "owned_by": "dist-infer"}
    return {**found, "max_model_len": state.max_model_len if isinstance(state, Ready) else None}


def _health(service: Service, *, startup: bool) -> Response:
    """200 when ready (startup: and ever after), else 503 with the phase."""
    state = service.state
    if isinstance(state, Ready):
        return _json({"status": "ready", "phase": "ready"})
    if isinstance(state, Degraded):  # its detail may name pids and hosts: not for everybody
        return _json({"status": "degraded", "phase": "degraded"}, 200 if startup else 503)
    if isinstance(state, Loading):
        return _json({"status": "loading", "phase": state.phase, "done": state.done, "total": state.total}, 503)
    if isinstance(state, Draining):
        return _json({"status": "draining", "phase": "draining"}, 200 if startup else 503)
    if isinstance(state, Failed):
        return _json({"status": "failed", "phase": "failed"}, 503)
    raise RuntimeError(f"unknown state {state!r}")


def _json(data: Any, status: int = 200) -> Response:
    return Response(json.dumps(data).encode(), status, media_type=_JSON)
