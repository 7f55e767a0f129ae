"""A model with its HTTP app: loads while it already answers 503, serves, drains, closes. One event loop's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI

from dist_infer.config import RunConfig
from dist_infer.llm import LLM
from dist_infer.openai.app import Settings, make_app
from dist_infer.openai.guard import ACCESS_LOG
from dist_infer.openai.keys import ApiKey, KeyRing
from dist_infer.openai.server import HttpServer
from dist_infer.openai.service import Draining, Failed, Loading, Ready, Service
from dist_infer.serve_config import ServeConfig
from dist_infer.startup import Progress
from partition.errors import ConfigError, DistInferError

_log = logging.getLogger(__name__)
_LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """phase: loading, ready, draining or failed. url: where it listens, if it does. error: kind and message."""

    phase: str
    detail: str = ""
    done: int = 0
    total: int = 0
    url: str | None = None
    ready_line: str = ""
    error_kind: str = ""
    error: str = ""


class Endpoint:
    """Made in the event loop in which it is used. `run` must be config's own. ready_line: words on what was started."""

    def __init__(
        self,
        config: RunConfig,
        run: ServeConfig,
        keys: tuple[ApiKey, ...],
        *,
        ready_line: Callable[[LLM], str] = lambda llm: "",
    ) -> None:
        self._config, self._run = config, run
        self.service = Service(model_name=run.model_name or config.name, limits=run.limits)
        self.app: FastAPI = make_app(self.service, Settings(keys=KeyRing(keys), hosts=run.hosts))
        self._make_ready_line, self._ready_line = ready_line, ""
        self._server: HttpServer | None = None
        self._llm: LLM | None = None
        self._loading: asyncio.Task[None] | None = None
        self._log_file: logging.Handler | None = None

    async def start(self, *, listen: bool) -> None:
        """Begin to load, and to listen if this app has no server around it. What goes wrong is in `status`."""
        try:
            self._open_log()
            if listen:
                self._server = HttpServer(self.app, self._run)
                await self._server.start()
        except DistInferError as error:
            self.service.fail(error)
            return
        self._loading = asyncio.ensure_future(self._load())

    async def status(self, seen: Status | None = None) -> Status:
        """How it stands; with what was seen last, waits up to a second for something new."""
        for _ in range(10):
            found = self._status()
            if found != seen:
                break
            await asyncio.sleep(_LOOK_S / 10)
        return found

    def raise_if_lost(self) -> None:
        """For whoever restarts it: raises when an engine that was ready has failed."""
        state = self.service.state
        if self._llm is not None and isinstance(state, Failed):
            raise state.error

    async def drain(self, timeout_s: float) -> bool:
        """Let open requests finish, refuse new ones. False: some had to be broken off."""
        return await self.service.drain(timeout_s)

    async def close(self) -> None:
        """End the server, the model and its ranks. Idempotent; waits for a load that is under way."""
        if not isinstance(self.service.state, Failed):
            await self.service.drain(0)
        if self._loading is not None:
            await asyncio.wait((self._loading,))
        if self._server is not None:
            await self._server.stop()
        if self._llm is not None:
            await asyncio.to_thread(self._llm.close)
        self.service.close()
        if self._log_file is not None:
            ACCESS_LOG.removeHandler(self._log_file)
            self._log_file.close()

    async def _load(self) -> None:
        try:
            self._llm = await asyncio.to_thread(LLM, self._config, on_progress=self._note)
        except Exception as error:
            if not isinstance(error, DistInferError):
                _log.exception("the model could not be started")
            self.service.fail(error)
            return
        self._ready_line = self._make_ready_line(self._llm)
        plan = self._llm.plan
        self.service.become_ready(self._llm, max_requests=plan.max_requests, max_model_len=plan.max_model_len)

    def _note(self, progress: Progress) -> None:
        self.service.note_progress(progress.phase, progress.done, progress.total)

    def _open_log(self) -> None:
        if self._run.access_log is None:
            return
        try:
            self._log_file = logging.FileHandler(self._run.access_log, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.access_log: cannot write {self._run.access_log}: {error.strerror}") from error
        self._log_file.setFormatter(logging.Formatter("%(message)s"))
        ACCESS_LOG.addHandler(self._log_file)
        ACCESS_LOG.setLevel(logging.INFO)
        ACCESS_LOG.propagate = False

    def _status(self) -> Status:
        state = self.service.state
        url = None if self._server is None else self._server.url
        if isinstance(state, Loading):
            return Status(phase="loading", detail=state.phase, done=state.done, total=state.total, url=url)
        if isinstance(state, Ready):
            return Status(phase="ready", url=url, ready_line=self._ready_line)
        if isinstance(state, Draining):
            return Status(phase="draining", url=url)
        return Status(phase="failed", url=url, error_kind=type(state.error).__name__, error=str(state.error))
