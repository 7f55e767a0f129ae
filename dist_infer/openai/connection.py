"""uvicorn's HTTP/1.1 connection, with ends to everything that a client can leave half done.

headers ──header_time──> 408, closed      nothing ──idle_time──> closed      answer unread ──write_time──> aborted
body    ──body_time, then a little──> aborted      too many pieces or bytes of a body ──> 400, closed
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from dist_infer.openai.errors import ApiError, bad_request, unavailable
from dist_infer.serve_config import ServeLimits

MAX_HEADER_BYTES: Final = 32 << 10
_MAX_PIECES = 4096  # of one chunked body: each costs time of everybody's
_GRACE_S = 2.0  # the app itself answers a slow body first
_MAX_DISCARDED_BYTES = 1 << 20  # of a body that was refused already, so that the client sees why
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 503: b"Service Unavailable"}


class _BoundedParser(h11.Connection):
    """Counts what the body of the request under way has brought."""

    def __init__(self, max_body_bytes: int) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self._max_body_bytes = max_body_bytes
        self._num_pieces = self._num_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > _MAX_PIECES or self._num_bytes > self._max_body_bytes + _MAX_DISCARDED_BYTES:
                raise h11.RemoteProtocolError("the body has more pieces or bytes than one may have")
        return event


class Connection(H11Protocol):
    """Made by `protocol_class`; runs in the event loop."""

    limits: ServeLimits
    on_refused: Callable[[ApiError], None]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _BoundedParser(self.limits.max_body)
        self._deadline: asyncio.TimerHandle | None = None
        self._waits_for = ""
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self.limits.max_connections:
            self._refuse(unavailable("too many connections are open", "too_many_connections", 1))
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._expect("", 0)
        self._all_read()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.limits.write_time, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._all_read()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for a client that reads nothing
            return
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Of uvicorn's, in the shape of all errors. An answer that has begun is cut off instead."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self._answer_has_begun():
            self._refuse(bad_request("this is not an HTTP request that can be read", code="invalid_http"))
        else:
            self.transport.abort()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self.send_400_response("")

    def _answer_has_begun(self) -> bool:
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    def _watch(self) -> None:
        """Which part of a request is awaited, and until when: the clock of a part starts once."""
        if self.transport.is_closing():
            self._expect("", 0)
        elif self.cycle is not None and self.cycle.more_body:
            self._expect("body", self.limits.body_time + _GRACE_S)
        elif self.cycle is None or self.cycle.response_complete:
            if self.timeout_keep_alive_task is None:  # else it is idle, and that timer is uvicorn's
                self._expect("headers", self.limits.header_time)
            else:
                self._expect("", 0)
        else:
            self._expect("", 0)

    def _expect(self, part: str, within_s: float) -> None:
        if part == self._waits_for:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._waits_for = part
        self._deadline = self.loop.call_later(within_s, self._too_late) if part else None

    def _too_late(self) -> None:
        if self._waits_for == "headers" and self.conn.our_state is h11.IDLE:
            self._refuse(ApiError(408, "the headers did not come in time", code="request_timeout"))
        else:
            self.transport.abort()

    def _all_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _refuse(self, error: ApiError) -> None:
        """Answer without the app, and close."""
        self.on_refused(error)
        body = error.body()
        head = (
            f"HTTP/1.1 {error.status} {_REASONS[error.status].decode()}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        lines = "".join(f"{name}: {value}\r\n" for name, value in error.headers().items())
        self._expect("", 0)
        self.transport.write(head.encode() + lines.encode() + b"\r\n" + body)
        self.transport.close()
        self._unread = self._unread or self.loop.call_later(self.limits.write_time, self.transport.abort)


def protocol_class(limits: ServeLimits, on_refused: Callable[[ApiError], None]) -> type[Connection]:
    return type("Connection", (Connection,), {"limits": limits, "on_refused": staticmethod(on_refused)})
