"""The endpoint's side of the engine: phases, admission, deadlines, and every request's events to its own coroutine.

    admit ──> Ticket (counted in) ──> take_tokens ──> events ──> first_token ──> leaves the `with` (counted out)
                429 / 503                429

Used by the event loop's thread, but for `note_progress`. Text never passes through here on its way to a log.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from dist_infer import gang_state
from dist_infer.gang_state import describe
from dist_infer.openai.dialect import ReasoningSetting, ToolSetting, find_dialect
from dist_infer.openai.errors import ApiError, bad_request, too_many, unavailable
from dist_infer.openai.phases import Degraded, Draining, Failed, Loading, Ready, State
from dist_infer.openai.port import Engine
from dist_infer.openai.service_metrics import ServiceMetrics
from dist_infer.outputs import Event, TokenEvent
from dist_infer.sampling_params import SamplingParams
from dist_infer.serve_config import ServeLimits

__all__ = ["Degraded", "Draining", "Engine", "Failed", "Loading", "Ready", "Service", "State", "Ticket", "check_length"]
T = TypeVar("T")
_THREADS = 2  # tokenizers compute without the interpreter's lock
_MAX_NEW_GRAMMARS = 8  # that wait to be compiled, one by one, each for up to a second
_RETRY_LOADING_S = 5.0
_MAX_RETRY_S = 60.0
_WEIGHT_OF_NEWEST = 0.1


class Ticket:
    """One HTTP request's share of the queue. Times are of the service's clock."""

    def __init__(self, service: Service, num_answers: int, ready: Ready) -> None:
        self._service, self._num_answers = service, num_answers
        self._waiting_tokens = 0
        self.ready = ready
        self.arrival_s = service.clock()
        self.times = service.metrics.follow(self.arrival_s)

    def take_tokens(self, num_tokens: int) -> None:
        """ApiError 429 when too many prompt tokens wait already. A request with nobody before it always may."""
        service = self._service
        waiting = service.num_waiting_tokens
        if waiting and waiting + num_tokens > service.limits.max_queued_tokens:
            raise too_many(
                f"{waiting} prompt tokens are waiting and this request has {num_tokens}; "
                f"{service.limits.max_queued_tokens} may wait",
                "queue_full",
                service.retry_after_s(),
            )
        self._waiting_tokens = num_tokens
        service.num_waiting_tokens += num_tokens

    def first_token(self) -> None:
        """It waits no longer. Idempotent."""
        self._service.num_waiting_tokens -= self._waiting_tokens
        self._waiting_tokens = 0


class _Hub:
    """Events of all requests from the engine's thread into the loop, with one wake-up for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[asyncio.Queue[tuple[int, Event]], tuple[int, Event]]] = deque()
        self._is_woken = False

    def post(self, target: asyncio.Queue[tuple[int, Event]], item: tuple[int, Event]) -> None:
        self._items.append((target, item))
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._is_woken = False  # before looking: what comes from here on wakes again
        while self._items:
            target, item = self._items.popleft()
            target.put_nowait(item)


class Service:
    """Made and used in one event loop. log_prompts: what is asked and answered may be logged."""

    def __init__(
        self,
        *,
        model_name: str,
        limits: ServeLimits,
        log_prompts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model_name, self.limits, self.clock = model_name, limits, clock
        self.wall_clock: Callable[[], float] = time.time
        self.created = int(time.time())
        self.log_prompts = log_prompts
        self.metrics = ServiceMetrics(self)
        self.num_waiting_tokens = 0
        self.num_open = 0  # answers that were admitted and have no end
        self._state: State = Loading()
        self._mean_request_s = 1.0
        self._empty = asyncio.Event()
        self._empty.set()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="dist-infer-text")
        self._grammar_threads = ThreadPoolExecutor(_MAX_NEW_GRAMMARS, thread_name_prefix="dist-infer-grammar")
        self._num_new_grammars = 0
        self._hub = _Hub(asyncio.get_running_loop())
        self._running: set[str] = set()

    # ---- phases

    @property
    def state(self) -> State:
        state = self._state
        if not isinstance(state, Ready):
            return state
        if (failure := state.engine.failure) is not None:
            return Failed(error=failure)
        gang = state.engine.state
        return Degraded(ready=state, detail=describe(gang)) if isinstance(gang, gang_state.Degraded) else state

    def note_progress(self, phase: str, done: int, total: int) -> None:
        """Any thread."""
        if isinstance(self._state, Loading):
            self._state = Loading(phase=phase, done=done, total=total)

    def become_ready(
        self,
        engine: Engine,
        *,
        max_requests: int,
        max_model_len: int,
        tool_format: ToolSetting = "auto",
        reasoning_format: ReasoningSetting = "auto",
    ) -> None:
        """The engine stays its owner's to close, after `close`. The formats are the run file's."""
        if isinstance(self._state, Loading):
            dialect = find_dialect(engine, tool_format, reasoning_format)
            self._state = Ready(engine=engine, max_requests=max_requests, max_model_len=max_model_len, dialect=dialect)
            self.metrics.watch(engine)

    def fail(self, error: Exception) -> None:
        self._state = Failed(error=error)

    async def drain(self, timeout_s: float) -> bool:
        """No new requests from here on; those that are open may end by themselves. False: some were aborted."""
        if not isinstance(self._state, Draining):
            self._state = Draining(ready=self._state if isinstance(self._state, Ready) else None)
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            ready = self._state.ready if isinstance(self._state, Draining) else None
            for request_id in tuple(self._running):
                if ready is not None:
                    ready.engine.abort(request_id)
            return False
        return True

    def close(self) -> None:
        for threads in (self._threads, self._grammar_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self.metrics.close()

    # ---- requests

    def require_ready(self) -> Ready:
        """While ranks are replaced, too: who comes then waits in the queue. ApiError 503, with what the matter is."""
        state = self.state
        if isinstance(state, Ready):
            return state
        if isinstance(state, Degraded):
            return state.ready
        if isinstance(state, Loading):
            count = f" {state.done} of {state.total}" if state.total else ""
            raise unavailable(f"the model is not ready: {state.phase}{count}", "loading", _RETRY_LOADING_S)
        if isinstance(state, Draining):
            raise unavailable("the server is shutting down", "draining", _RETRY_LOADING_S)
        raise unavailable("the engine has failed and is being replaced", "engine_unavailable", 2 * _RETRY_LOADING_S)

    def refuse_if_full(self, num_answers: int) -> Ready:
        """ApiError: 400 more than ever fits, 429 full, 503 not ready. With 1, before a body is looked at: whoever is
        refused in a crowd should cost little."""
        ready = self.require_ready()
        most = ready.max_requests + self.limits.max_queued_requests
        if num_answers > most:
            raise bad_request(f"{num_answers} answers are asked for at once; {most} can be open here", param="n")
        if self.num_open + num_answers > most:
            raise too_many(
                f"the queue is full: {self.num_open} answers are open and {most} may be",
                "queue_full",
                self.retry_after_s(),
            )
        return ready

    @contextmanager
    def admit(self, num_answers: int) -> Iterator[Ticket]:
        """Count a request in, and out at its end. Raises what `refuse_if_full` does."""
        ready = self.refuse_if_full(num_answers)
        ticket = Ticket(self, num_answers, ready)
        self.num_open += num_answers
        self._empty.clear()
        try:
            yield ticket
        finally:
            ticket.first_token()
            self.num_open -= num_answers
            took_s = self.clock() - ticket.arrival_s
            self._mean_request_s += _WEIGHT_OF_NEWEST * (took_s - self._mean_request_s)
            if not self.num_open:
                self._empty.set()

    def retry_after_s(self) -> float:
        """When a place should be free, by how long requests took lately."""
        state = self._state
        width = state.max_requests if isinstance(state, Ready) else 1
        return min(_MAX_RETRY_S, max(1.0, self._mean_request_s * max(1, self.num_open - width) / width))

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """For tokenizers and templates: they must not hold up others' streams."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def check_grammar(self, ticket: Ticket, ids: Sequence[int], params: SamplingParams) -> None:
        """ConfigError for a grammar that cannot be used, ApiError 429 when too many wait to be compiled.

        In threads of their own: nobody's stream, tokenizer or known grammar waits for a bad one.
        """
        engine = ticket.ready.engine
        if params.grammar is None or engine.knows_grammar(params.grammar):
            engine.check(ids, params)
            return
        if self._num_new_grammars >= _MAX_NEW_GRAMMARS:
            raise too_many(f"{self._num_new_grammars} new grammars are being compiled", "grammar_queue_full", 2)
        self._num_new_grammars += 1
        done = asyncio.get_running_loop().run_in_executor(self._grammar_threads, engine.check, ids, params)
        done.add_done_callback(self._grammar_done)
        await asyncio.shield(done)  # a client that leaves does not give its thread back

    def _grammar_done(self, done: asyncio.Future[None]) -> None:
        self._num_new_grammars -= 1
        if not done.cancelled():
            done.exception()  # it was told to whoever still waits

    async def events(
        self,
        ticket: Ticket,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams,
        *,
        priority: int = 0,
        is_enough: Callable[[int], bool] = lambda index: False,
    ) -> AsyncGenerator[list[tuple[int, Event]], None]:
        """(index of the prompt, event), as many at a time as there are, until each prompt has its end.

        is_enough: asked after each batch, whether no more is wanted of a prompt: it is then aborted. Close it early to
        abort what is left. TimeoutError when the first token does not come within queue_time.
        Raises what `Engine.submit` raises; then nothing stays queued.
        """
        engine = ticket.ready.engine
        arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        open_ids: dict[int, str] = {}

        def sink(index: int) -> Callable[[Event], None]:
            return lambda event: self._hub.post(arrived, (index, event))

        is_waiting = True
        try:
            for index, (text, ids) in enumerate(prompts):
                open_ids[index] = engine.submit(text, ids, params, sink(index), priority=priority)
                self._running.add(open_ids[index])
            while open_ids:
                if is_waiting:
                    left_s = ticket.arrival_s + self.limits.queue_time - self.clock()
                    async with asyncio.timeout(max(0.0, left_s)):  # wait_for may lose a cancellation (Python 3.11)
                        batch = [await arrived.get()]
                    is_waiting = False
                    ticket.first_token()
                else:
                    batch = [await arrived.get()]
                while not arrived.empty():
                    batch.append(arrived.get_nowait())
                ticket.times.take(batch, self.clock())
                for index, event in batch:
                    if not isinstance(event, TokenEvent):
                        self._running.discard(open_ids.pop(index))
                yield batch
                for index, request_id in open_ids.items():
                    if is_enough(index):
                        engine.abort(request_id)  # once more, until its end has come, does no harm
        finally:
            for request_id in open_ids.values():
                self._running.discard(request_id)
                engine.abort(request_id)


def check_length(ticket: Ticket, ids: Sequence[int], params: SamplingParams) -> None:
    """ApiError 400 for a prompt that with its answer can never fit; ConfigError for what else the engine refuses."""
    longest = ticket.ready.max_model_len
    if params.max_tokens is not None and len(ids) + params.max_tokens > longest:
        raise context_exceeded(len(ids), params.max_tokens, longest)
    ticket.ready.engine.check(ids, params)


def context_exceeded(num_prompt_tokens: int, max_tokens: int, longest: int) -> ApiError:
    return bad_request(
        f"the prompt has {num_prompt_tokens} tokens and the answer may have {max_tokens}, but both together may have "
        f"{longest}: shorten the prompt or lower max_tokens",
        param="max_tokens",
        code="context_length_exceeded",
    )
