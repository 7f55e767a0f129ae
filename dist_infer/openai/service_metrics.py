"""One service's figures: counts, times and what its ranks say, as the text of `GET /metrics`."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from dist_infer import __version__
from dist_infer.metrics.exposition import Exposition
from dist_infer.metrics.rank_watch import Ranks, RankWatch
from dist_infer.metrics.request_times import AnswerTimes, RequestHistograms
from dist_infer.metrics.snapshot import NO_STATS, Build, Phase, Snapshot
from dist_infer.openai.logs import PROMPT_LOG, request_id_of
from dist_infer.openai.phases import Degraded, Draining, Failed, Loading
from dist_infer.openai.port import Engine
from dist_infer.outputs import RequestOutput

if TYPE_CHECKING:
    from dist_infer.openai.service import Service

_log = logging.getLogger(__name__)
_THREADS = 2  # one may wait for the ranks while the other writes
_PATIENCE_S = 0.5  # a scrape waits so long for the ranks, then shows what they said before
LEFT = 499  # in place of a status: the client was gone before it got one


class ServiceMetrics:
    """Its service's alone, used in the service's event loop. Without ranks (`watch`) their figures are left out."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.build = Build(version=__version__, model=service.model_name)
        self._start_s = time.time()
        self._answers: dict[tuple[str, str], int] = {}
        self._refused: dict[str, int] = {}
        self._requests = RequestHistograms()
        self._engine: Engine | None = None
        self._watch: RankWatch | None = None
        self._reading: asyncio.Future[None] | None = None
        self._is_told = False
        self._exposition = Exposition(self._snapshot)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="dist-infer-metrics")

    def watch(self, engine: Engine) -> None:
        """From here on its figures are shown, also after it failed; those of ranks if it has any."""
        self._engine = engine
        if isinstance(engine, Ranks):
            self._watch = RankWatch(engine)
            plan = engine.plan
            self.build = replace(self.build, tensor=str(plan.tensor), pipeline=str(plan.pipeline))

    def follow(self, arrival_s: float) -> AnswerTimes:
        """For one HTTP request, of whose events it must be told."""
        return AnswerTimes(self._requests, arrival_s, _log_text if self._service.log_prompts else None)

    def count_answer(self, route: str, status: int) -> None:
        """route: a template, or another of few texts."""
        key = (route, str(status or LEFT))
        self._answers[key] = self._answers.get(key, 0) + 1

    def count_refusal(self, reason: str) -> None:
        """reason: an error's code."""
        self._refused[reason] = self._refused.get(reason, 0) + 1

    async def text(self) -> bytes:
        """For a scrape. The loop is never held up by ranks or by writing."""
        loop = asyncio.get_running_loop()
        watch = self._watch
        if watch is not None and watch.is_due and (self._reading is None or self._reading.done()):
            self._reading = loop.run_in_executor(self._threads, self._read, watch)
        if self._reading is not None:
            await asyncio.wait((self._reading,), timeout=_PATIENCE_S)
        return await loop.run_in_executor(self._threads, self._exposition.text)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, watch: RankWatch) -> None:
        try:
            watch.read()
            self._is_told = False
        except Exception as error:  # whatever became of the ranks, a scrape shows what is known
            if not self._is_told:
                _log.warning("the ranks' figures cannot be read (%s); the last ones are shown", type(error).__name__)
            self._is_told = True

    def _snapshot(self) -> Snapshot:
        service = self._service
        phase, progress = _phase(service)
        watch = self._watch
        return Snapshot(
            build=self.build,
            start_s=self._start_s,
            phase=phase,
            progress=progress,
            num_open_answers=service.num_open,
            num_waiting_prompt_tokens=service.num_waiting_tokens,
            answers=self._answers,
            refused=self._refused,
            requests=self._requests,
            engine=NO_STATS if self._engine is None else self._engine.stats,
            ranks=None if watch is None else watch.last,
        )


def _phase(service: Service) -> tuple[Phase, tuple[str, float] | None]:
    """And, while loading, (step, share done); a step that cannot be counted is at 0."""
    state = service.state
    if isinstance(state, Loading):
        return "loading", (state.phase, state.done / state.total if state.total else 0.0)
    if isinstance(state, Failed):
        return "failed", None
    if isinstance(state, Degraded):
        return "degraded", None
    return "draining" if isinstance(state, Draining) else "ready", ("ready", 1.0)


def _log_text(output: RequestOutput) -> None:
    """What was asked and answered; only ever called with run.log_prompts."""
    asked: str | Sequence[int] = output.prompt_token_ids if output.prompt is None else output.prompt
    line = {
        "time": round(time.time(), 3),
        "level": "info",
        "logger": PROMPT_LOG.name,
        "request_id": request_id_of(),
        "prompt": asked,
        "answers": [answer.text for answer in output.outputs],
    }
    PROMPT_LOG.info("%s", json.dumps(line))
