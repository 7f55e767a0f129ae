"""Around every route: request id, Host, key, rate, the shape of errors, the access log. Plain ASGI."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

from dist_infer.openai.errors import ApiError, bad_request, internal, translated
from dist_infer.openai.keys import KeyRing
from dist_infer.openai.stream import Counts

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

ACCESS_LOG = logging.getLogger("dist_infer.access")
_log = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/health/startup"})  # probes have no keys
_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_SHOWN_PATH_CHARS = 128


class Guard:
    """hosts: what the Host header may say, without port; `*` anything, `*.example.org` whatever ends so."""

    def __init__(self, app: App, *, keys: KeyRing, hosts: tuple[str, ...]) -> None:
        self._app, self._keys = app, keys
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
        started_s, status, name = time.monotonic(), 0, ""

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
                name = "" if key is None else key.name
                with self._keys.using(key if scope["method"] == "POST" else None):
                    await self._app(scope, receive, sending)
        except Exception as error:
            known = translated(error)
            if known is None:
                _log.exception("request %s failed", request_id)
                known = internal(request_id)
            if status:  # nothing can be told any more; the connection is closed
                raise
            await respond(sending, known)
        finally:
            ACCESS_LOG.info(
                "%s",
                json.dumps(
                    {
                        "time": round(time.time(), 3),
                        "request_id": request_id,
                        "method": scope["method"],
                        "path": scope["path"][:_SHOWN_PATH_CHARS],
                        "status": status,
                        "duration_ms": round(1e3 * (time.monotonic() - started_s), 1),
                        "key": name,
                        "client": (scope.get("client") or ("",))[0],
                        "prompt_tokens": counts.num_prompt_tokens,
                        "output_tokens": counts.num_output_tokens,
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
        raise bad_request("this Host is not served here (run.allowed_hosts)", code="host_not_allowed")


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


def _headers(scope: Scope) -> Mapping[str, str]:
    """The first of each name; more than one Host or Authorization is nobody's honest request."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        text = name.decode("latin-1").lower()
        if text in found and text in ("host", "authorization"):
            found[text] = ""
        found.setdefault(text, value.decode("latin-1"))
    return found
