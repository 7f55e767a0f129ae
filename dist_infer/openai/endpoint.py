"""A model with its HTTP app: loads while it already answers 503, serves, drains, closes. One event loop's."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI

from dist_infer import __version__
from dist_infer.config import RunConfig
from dist_infer.llm import LLM
from dist_infer.metrics.snapshot import Build
from dist_infer.openai.app import Settings, make_app
from dist_infer.openai.errors import ApiError
from dist_infer.openai.keys import ApiKey, KeyRing
from dist_infer.openai.logs import LogFiles, described
from dist_infer.openai.server import HttpServer
from dist_infer.openai.service import Degraded, Draining, Failed, Loading, Ready, Service
from dist_infer.openai.tracing import RequestTracer
from dist_infer.serve_config import ServeConfig
from dist_infer.startup import Progress
from partition.errors import DistInferError

_log = logging.getLogger(__name__)
_LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """phase: loading, ready, degraded, draining or failed. url: where it listens, if it does. error: kind and text."""

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
        name = run.model_name or config.name
        self.service = Service(model_name=name, limits=run.limits, log_prompts=run.log_prompts)
        self.service.metrics.build = Build(
            version=__version__,
            model=name,
            executor=config.cluster.executor,
            tensor=str(config.parallel.tensor),
            pipeline=str(config.parallel.pipeline),
        )
        self._tracer = None if run.otlp_endpoint is None else RequestTracer(run.otlp_endpoint, model=name)
        self.app: FastAPI = make_app(
            self.service,
            Settings(keys=KeyRing(keys), hosts=run.hosts, origins=tuple(run.allowed_origins), tracer=self._tracer),
        )
        self._make_ready_line, self._ready_line = ready_line, ""
        self._server: HttpServer | None = None
        self._llm: LLM | None = None
        self._loading: asyncio.Task[None] | None = None
        self._logs: LogFiles | None = None

    async def start(self, *, listen: bool) -> None:
        """Begin to load, and to listen if this app has no server around it. What goes wrong is in `status`."""
        try:
            self._logs = LogFiles(
                access_log=self._run.access_log, log_file=self._run.log_file, log_prompts=self._run.log_prompts
            )
            if listen:
                self._server = HttpServer(self.app, self._run, on_refused=self._count_refused)
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
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if self._logs is not None:
            self._logs.close()

    async def _load(self) -> None:
        try:
            self._llm = await asyncio.to_thread(LLM, self._config, on_progress=self._note, apart=True)
        except Exception as error:
            if not isinstance(error, DistInferError):
                _log.error("the model could not be started: %s", described(error, with_text=True))  # nobody's prompt
            self.service.fail(error)
            return
        self._ready_line = self._make_ready_line(self._llm)
        plan = self._llm.plan
        self.service.become_ready(
            self._llm,
            max_requests=plan.max_requests,
            max_model_len=plan.max_model_len,
            tool_format=self._run.tool_format,
            reasoning_format=self._run.reasoning_format,
        )
        gc.collect()
        gc.freeze()  # what is there now stays: no search through it while clients wait

    def _note(self, progress: Progress) -> None:
        self.service.note_progress(progress.phase, progress.done, progress.total)

    def _count_refused(self, error: ApiError) -> None:
        """By the connection itself: the app never saw it."""
        self.service.metrics.count_answer("other", error.status)
        self.service.metrics.count_refusal(error.code or str(error.status))

    def _status(self) -> Status:
        state = self.service.state
        url = None if self._server is None else self._server.url
        if isinstance(state, Loading):
            return Status(phase="loading", detail=state.phase, done=state.done, total=state.total, url=url)
        if isinstance(state, Ready):
            return Status(phase="ready", url=url, ready_line=self._ready_line)
        if isinstance(state, Degraded):
            return Status(phase="degraded", detail=state.detail, url=url, ready_line=self._ready_line)
        if isinstance(state, Draining):
            return Status(phase="draining", url=url)
        return Status(phase="failed", url=url, error_kind=type(state.error).__name__, error=str(state.error))
