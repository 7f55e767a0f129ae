"""The app on a real socket over an engine that is there, and what tests wait for."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from dist_infer import LLM
from dist_infer.openai.app import Settings, make_app
from dist_infer.openai.keys import ApiKey, KeyRing
from dist_infer.openai.port import Engine
from dist_infer.openai.server import HttpServer
from dist_infer.openai.service import Service
from dist_infer.serve_config import ServeConfig, ServeLimits


class Served:
    """The app on its own loop, in a thread; the engine is shared by all."""

    def __init__(
        self,
        llm: Engine | None,
        limits: ServeLimits,
        keys: tuple[ApiKey, ...] = (),
        hosts: tuple[str, ...] = ("*",),
        formats: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """settings: more of `Settings`. formats: tool_format and reasoning_format."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.service, self.server = self.run(self._start(llm, limits, keys, hosts, formats or {}, settings))
        self.url = self.server.url
        self.port = self.server.port

    async def _start(
        self,
        llm: Engine | None,
        limits: ServeLimits,
        keys: tuple[ApiKey, ...],
        hosts: tuple[str, ...],
        formats: dict[str, Any],
        settings: dict[str, Any],
    ) -> tuple[Service, HttpServer]:
        service = Service(model_name="tiny", limits=limits)
        if llm is not None:
            plan: Any = llm.plan  # type: ignore[attr-defined]
            service.become_ready(llm, max_requests=plan.max_requests, max_model_len=plan.max_model_len, **formats)
        self.app = make_app(service, Settings(keys=KeyRing(keys), hosts=hosts, **settings))
        server = HttpServer(self.app, ServeConfig(kind="serve", port=0, limits=limits))
        await server.start()
        return service, server

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def close(self) -> None:
        self.run(self.service.drain(0))
        self.run(self.server.stop())
        self.service.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


def wait_until(what: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        pause.wait(0.01)


def assert_idle(llm: LLM) -> None:
    wait_until(lambda: llm.stats.num_running == llm.stats.num_waiting == 0)
    assert llm.stats.num_free_kv_blocks == llm.stats.num_kv_blocks


def raw_post(port: int, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request has been sent and nothing was read."""
    data = json.dumps(body).encode()
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    found.settimeout(10)
    found.connect(("127.0.0.1", port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    found.sendall(head.encode() + data)
    return found
