"""The app on a socket of its own, in the event loop that is running. Signals are the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from dist_infer.openai.connection import MAX_HEADER_BYTES, protocol_class
from dist_infer.openai.errors import ApiError
from dist_infer.serve_config import ServeConfig
from partition.errors import ClusterError, ConfigError

_BACKLOG = 2048
_CLOSE_S = 2.0


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpServer:
    """`start` listens, `stop` closes. Raises ConfigError for an address or a certificate that cannot be used.

    on_refused: is told of requests that were answered before the app saw them.
    """

    def __init__(
        self, app: Any, config: ServeConfig, *, on_refused: Callable[[ApiError], None] = lambda error: None
    ) -> None:
        self._config = config
        self._socket = _listen(config.host, config.port)
        self.port: int = self._socket.getsockname()[1]
        tls = config.tls
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                http=protocol_class(config.limits, on_refused),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, int(config.limits.idle_time)),
                timeout_graceful_shutdown=int(_CLOSE_S),
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                ssl_certfile=None if tls is None else tls.certificate,
                ssl_keyfile=None if tls is None else tls.key,
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"{'http' if self._config.tls is None else 'https'}://{host}:{self.port}"

    async def start(self) -> None:
        try:
            self._server.config.load()
        except (OSError, ValueError) as error:
            self._socket.close()
            raise ConfigError(f"run.tls: the certificate or its key cannot be used: {error}") from error
        self._task = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                raise ClusterError("the HTTP server ended before it had started")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Listen no more, close what is idle, cut what is left. Idempotent."""
        if self._task is None:
            self._socket.close()
            return
        self._server.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._task, 3 * _CLOSE_S)
        self._task = None


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another run.port (0 takes any that is free) or "
            "run.host"
        ) from error
    found.setblocking(False)
    return found
