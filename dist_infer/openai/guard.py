"""Around every route: request id, Host, key, rate, the shape of errors, access log, counts, spans. Plain ASGI."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

from dist_infer.openai.errors import ApiError, bad_request, forbidden, internal, translated
from dist_infer.openai.keys import KeyRing
from dist_infer.openai.logs import ACCESS_LOG, enter_request, log_failure
from dist_infer.openai.service_metrics import LEFT
from dist_infer.openai.stream import Counts
from dist_infer.openai.web_pages import WEB_FILES

if TYPE_CHECKING:
    from dist_infer.openai.service import Service
    from dist_infer.openai.tracing import RequestTracer

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

# probes have no keys; the page's files hold no secret
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/health/startup", *WEB_FILES})
_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_SHOWN_PATH_CHARS = 128
_METRICS = "/metrics"
_UNTRACED = OPEN_PATHS | {_METRICS}
_REFUSALS = frozenset({401, 403, 429, 503})
_NO_HOST = "host_not_allowed"


class CutOffError(Exception):
    """An answer broke off after it had begun: the server closes the connection, and says no more of it."""


class Guard:
    """hosts: what the Host header may say, without port; `*` anything, `*.example.org` whatever ends so."""

    def __init__(
        self,
        app: App,
        *,
        keys: KeyRing,
        hosts: tuple[str, ...],
        service: Service,
        tracer: RequestTracer | None = None,
    ) -> None:
        self._app, self._keys, self._service, self._tracer = app, keys, service, tracer
        self._any_host = "*" in hosts
        self._hosts = frozenset(host for host in hosts if not host.startswith("*"))
        self._suffixes = tuple(host[1:] for host in hosts if host.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _ID.match(asked) else f"req-{secrets.token_hex(12)}"
        counts = Counts()
        scope.setdefault("state", {})
        scope["state"]["request_id"], scope["state"]["counts"] = request_id, counts
        enter_request(request_id)
        started_s, status, name = time.monotonic(), 0, ""
        span = None
        if self._tracer is not None and scope["path"] not in _UNTRACED:
            span = self._tracer.begin(headers, scope["method"], request_id)

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            self._check_host(headers.get("host"))
            if scope["path"] in OPEN_PATHS:
                await self._app(scope, receive, sending)
            else:
                key = self._keys.who(headers.get("authorization"))
                scope["state"]["key"] = key
                name = "" if key is None else key.name
                if key is not None and key.only_metrics and scope["path"] != _METRICS:
                    raise forbidden(f"this key may only read {_METRICS}")
                with self._keys.using(key if scope["method"] == "POST" else None):
                    await self._app(scope, receive, sending)
        except Exception as error:
            known = translated(error)
            if known is None:
                log_failure(request_id, error, with_text=self._service.log_prompts)
                known = internal(request_id)
            if status:  # nothing can be told any more; the connection is closed
                raise CutOffError(f"request {request_id}") from None  # what it was is in the log already
            if known.status in _REFUSALS or known.code == _NO_HOST:
                self._service.metrics.count_refusal(known.code or str(known.status))
            await respond(sending, known)
        finally:
            route = _route(scope)
            self._service.metrics.count_answer(route, status)
            if span is not None:
                span.end(
                    method=scope["method"],
                    route=route,
                    status=status or LEFT,
                    num_prompt_tokens=counts.num_prompt_tokens,
                    num_output_tokens=counts.num_output_tokens,
                    ttft_s=counts.ttft_s,
                )
            ACCESS_LOG.info(
                "%s",
                json.dumps(
                    {
                        "time": round(time.time(), 3),
                        "level": "info",
                        "logger": ACCESS_LOG.name,
                        "request_id": request_id,
                        "method": scope["method"],
                        "path": scope["path"][:_SHOWN_PATH_CHARS],
                        "status": status,
                        "duration_ms": round(1e3 * (time.monotonic() - started_s), 1),
                        "key": name,
                        "client": (scope.get("client") or ("",))[0],
                        "prompt_tokens": counts.num_prompt_tokens,
                        "output_tokens": counts.num_output_tokens,
                        "ttft_ms": None if counts.ttft_s is None else round(1e3 * counts.ttft_s, 1),
                        "user": counts.user,
                    }
                ),
            )

    def _check_host(self, header: str | None) -> None:
        if self._any_host:
            return
        name = re.sub(r":\d*$", "", (header or "").strip().lower())
        if name in self._hosts or (self._suffixes and name.endswith(self._suffixes)):
            return
        raise bad_request("this Host is not served here (run.allowed_hosts)", code=_NO_HOST)


async def respond(send: Send, error: ApiError) -> None:
    data = error.body()
    headers = {"content-type": "application/json", "content-length": str(len(data)), **error.headers()}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": data})


def _route(scope: Scope) -> str:
    """The template of the route that was taken, so that there are few of them."""
    return str(getattr(scope.get("route"), "path", "other"))


def _headers(scope: Scope) -> Mapping[str, str]:
    """The first of each name; more than one Host or Authorization is nobody's honest request."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        text = name.decode("latin-1").lower()
        if text in found and text in ("host", "authorization"):
            found[text] = ""
        found.setdefault(text, value.decode("latin-1"))
    return found
