"""The engine: one thread that turns requests into steps and step results into events.

    submit, abort ──inbox──> [ schedule, submit, tell, collect, apply ] ──events──> on_event of each request
     any thread                        the engine's thread                          called by the engine's thread

What a step has brought is told once the next one is on its way: who hears of it takes time while ranks compute, and not
between two steps, when they wait.

Every request gets exactly one end, Finished or Failed. An error in one request's own work (its text, its stop strings,
its callback) fails that request. When the executor loses its ranks the engine asks for others (`recover`), computes
again what they knew and goes on: who waits for an answer sees a pause. Where there are none to be had, all requests
fail, and the engine takes no more.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from dist_infer.engine.answer import Decode
from dist_infer.engine.bad_words import Encode, bad_word_ids
from dist_infer.engine.detokenizer import TokenKinds
from dist_infer.engine.executor import Executor
from dist_infer.engine.generation import Generation, OnEvent
from dist_infer.engine.grammars import Grammars
from dist_infer.engine.kept_tokens import keeping
from dist_infer.engine.live_requests import LiveRequests
from dist_infer.engine.recover import Recover
from dist_infer.engine.request import Request
from dist_infer.engine.scheduler import Scheduler
from dist_infer.engine.stats import EngineStats
from dist_infer.messages import SampledToken, StepPlan, StepResult
from dist_infer.outputs import TokenEvent
from dist_infer.sampling_params import SamplingParams
from partition.errors import ClusterError, ClusterGoneError, ConfigError, DistInferError

_IDLE_WAIT_S = 60.0  # an idle engine checks its integrity this often
_NUM_BAD_WORD_LISTS = 64  # kept as token ids: most requests of an application have the same
_JOIN_S = 5.0  # for the thread to notice that the executor is closed


@dataclass(frozen=True, slots=True)
class _Abort:
    generation: Generation


class EngineLoop:
    """Takes over an executor that was started: `close` closes it, and those that `recover` brings after it.

    The scheduler is used by nobody else.

    decode: token ids -> text, called by the engine's thread. token_kinds: what its texts do not show. decode_special:
    the same with special tokens' texts, for requests that keep some; None: none are kept. encode: text ->
    token ids without special tokens, for bad words; None without a tokenizer: then they are refused, and stop strings.
    grammars: what knows whether one can be used; None without a tokenizer. step_timeout_s: a step that takes longer is
    a failure of the executor. recover: None: its first failure is the last. clock: seconds, for the requests' metrics
    only.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        scheduler: Scheduler,
        decode: Decode,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        step_timeout_s: float,
        token_kinds: TokenKinds | None = None,
        decode_special: Decode | None = None,
        encode: Encode | None = None,
        grammars: Grammars | None = None,
        recover: Recover | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < step_timeout_s <= threading.TIMEOUT_MAX:
            raise ConfigError(f"step_timeout_s must be a finite number of seconds above 0, not {step_timeout_s}")
        self._executor = executor
        self._scheduler = scheduler
        self._decode = decode
        self._token_kinds = token_kinds
        self._decode_special = decode_special
        self._encode = encode
        self._bad_word_ids = functools.lru_cache(_NUM_BAD_WORD_LISTS)(self._encode_bad_words)
        self._grammars = grammars
        self._ranks_know_vocabulary = False
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._step_timeout_s = step_timeout_s
        self._recover = recover
        self._clock = clock
        self._epoch = 0
        self._num_gang_restarts = 0
        self._thread = threading.Thread(target=self._main, name="dist-infer-engine", daemon=True)
        self._live = LiveRequests(clock)
        self._outbox: deque[tuple[Generation, TokenEvent | None]] = deque()  # None: its end
        self._wake = threading.Condition()  # guards what is listed down to _num_submitted
        self._inbox: list[Request | _Abort] = []
        self._loss: ClusterError | None = None  # of the executor that is in use
        self._is_recovering = False
        self._closing = False
        self._failure: Exception | None = None
        self._num_submitted = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._stats = self._take_stats()

    # ---- any thread

    def start(self) -> None:
        """Begin to work; requests submitted before are served now. Once only."""
        self._watch(self._executor)
        self._thread.start()

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        prompt: str | None,
        params: SamplingParams,
        on_event: OnEvent,
        priority: int = 0,
    ) -> None:
        """Queue a request; it owns nothing before it was checked. `on_event` must be quick: all requests wait for it.

        priority: lower is sooner, among those that wait and when KV blocks run out; equals in the order they came.
        A grammar that was not seen before takes up to a second to check: call `check` in a thread that may wait.

        `request_id` may be used again after its end. Raises ConfigError for a prompt that cannot be run or an id that
        is in use, ClusterError when the engine has failed or is closed; then there is no event.
        """
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ConfigError(f"priority must be a whole number, lower is sooner, not {priority!r}")
        bad_words = self._checked(prompt_token_ids, params)
        prompt_ids = tuple(prompt_token_ids)
        kept = params.kept_special_token_ids
        decode, kinds = keeping(kept, self._decode, self._decode_special, self._token_kinds)
        seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed
        with self._wake:
            if self._failure is not None:
                raise ClusterError(f"the engine has failed and takes no requests: {self._failure}") from self._failure
            if self._closing:
                raise ClusterError("the engine is closed and takes no requests")
            # a client may name two requests alike, one after the other; to the ranks they stay two
            name = f"{request_id}#{self._num_submitted}"
            requests = [
                Request(
                    id=f"{name}.{index}" if index else name,
                    prompt_token_ids=prompt_ids,
                    params=params,
                    sampling=params.spec(seed, index=index, eos_token_ids=self._eos_token_ids, bad_words=bad_words),
                    eos_token_ids=self._eos_token_ids,
                    priority=priority,
                )
                for index in range(params.num_samples)
            ]
            if len(requests) > 1:
                siblings = tuple(requests)
                for request in requests:
                    request.siblings = siblings
            generation = Generation(
                request_id=request_id,
                requests=requests,
                prompt=prompt,
                on_event=on_event,
                decode=decode,
                token_kinds=kinds,
                arrival_s=self._clock(),
            )
            self._live.add(generation)
            self._num_submitted += 1
            self._inbox += requests
            self._wake.notify()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Requests submitted within are seen by the engine at once: their prompts share the first step."""
        with self._wake:
            yield

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """ConfigError if `submit` would refuse this request for what it is; nothing is queued."""
        self._checked(prompt_token_ids, params)

    def abort(self, request_id: str) -> bool:
        """End it with reason "abort"; False when there is no such live request (it may have ended just now)."""
        with self._wake:
            if (generation := self._live.by_client_id(request_id)) is None:
                return False
            self._inbox.append(_Abort(generation))
            self._wake.notify()
            return True

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def failure(self) -> Exception | None:
        """Why the engine takes no more requests; None while it is well."""
        with self._wake:
            return self._failure

    def integrity(self) -> None:
        """RuntimeError when a KV block or a request was lost. For an idle or closed engine."""
        self._scheduler.integrity()
        with self._wake:
            if not self._scheduler.has_requests and not self._inbox and (live := self._live.all()):
                names = [generation.request_id for generation in live]
                raise RuntimeError(f"requests {names} have no end and nobody works on them")

    def close(self, timeout_s: float = 5.0) -> None:
        """End what is alive with reason "abort", wait for steps in flight up to the timeout, close the executor.

        A recovery that is under way is given up. Idempotent. RuntimeError from within an `on_event`.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("EngineLoop.close was called from on_event: the engine's thread cannot wait for itself")
        with self._wake:
            self._closing = True
            self._wake.notify()
            is_recovering = self._is_recovering
        if is_recovering and self._recover is not None:
            self._recover.cancel()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._executor.close()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)
        self._end_all(None)  # never started, or the executor holds the thread for ever

    # ---- the engine's thread

    def _run(self) -> None:
        while self._take_inbox():
            try:
                self._raise_loss()
                while (plan := self._scheduler.schedule()) is not None:
                    self._note_scheduled(plan)
                    self._executor.submit(self._for_ranks(plan))
                self._tell()
                if self._scheduler.num_in_flight:
                    result = self._executor.collect(self._step_timeout_s)
                    new_tokens = self._scheduler.apply(result)
                    self._take_prompt_logprobs(result)
                    self._deliver(new_tokens)
            except ClusterError as error:
                self._go_on_with_others(error)

    def _main(self) -> None:
        error: Exception | None = None
        try:
            self._run()
        except Exception as caught:
            error = caught
        except BaseException as caught:  # a callback may raise CancelledError or SystemExit; its neighbours need an end
            error = ClusterError(f"the engine's thread was ended by {caught!r}")
        self._end_all(error)
        self._stats = self._take_stats()

    def _take_inbox(self) -> bool:
        """Wait until there is something to do, let new requests and aborts in. False: closed and nothing in flight."""
        if not self._scheduler.has_requests:
            self._tell()
        self._stats = self._take_stats()
        with self._wake:
            while not (self._inbox or self._closing or self._loss or self._scheduler.has_requests):
                self.integrity()
                self._wake.wait(_IDLE_WAIT_S)
            inbox, self._inbox = self._inbox, []
            closing = self._closing
        for item in inbox:
            if isinstance(item, _Abort):
                self._abort(item.generation)
            elif (generation := self._live.by_rank_id(item.id)) is not None:  # None: a sibling did not fit
                self._add(item, generation)
        if closing:
            for generation in self._live.all():
                self._abort(generation)
        return not closing or self._scheduler.num_in_flight > 0

    def _add(self, request: Request, generation: Generation) -> None:
        try:
            self._scheduler.add(request)
        except ConfigError as error:  # it was checked against ranks that are gone
            self._fail(generation, error)
            return
        if request is generation.requests[0]:
            self._num_prompt_tokens += request.num_prompt_tokens

    def _watch(self, executor: Executor) -> None:
        def note(error: ClusterError) -> None:
            with self._wake:
                if executor is self._executor:  # one that is out of use has nothing to say
                    self._loss = error
                    self._wake.notify()

        executor.watch(note)

    def _raise_loss(self) -> None:
        with self._wake:
            if self._loss is not None:
                raise self._loss

    def _go_on_with_others(self, error: ClusterError) -> None:
        """Replace the ranks and let every request begin again on the new ones, from what it has so far.

        Raises the error when that is not wanted, with the second cause when it fails.
        """
        self._tell()
        with self._wake:
            if self._recover is None or self._closing or isinstance(error, ClusterGoneError):
                raise error
            self._is_recovering = True
        try:
            found = self._recover(error)
        except Exception as second:
            raise ClusterError(f"{error}. The ranks could not be replaced: {second}") from second
        finally:
            with self._wake:
                self._is_recovering = False
        with self._wake:
            self._executor, self._loss = found.executor, None
        self._epoch, self._step_timeout_s = found.epoch, found.step_timeout_s
        self._num_gang_restarts += 1
        self._ranks_know_vocabulary = False
        for request in self._scheduler.rewind(found.scheduler):
            if (generation := self._live.by_rank_id(request.id)) is not None:
                self._fail(generation, _misfit(request, error))
        self._watch(found.executor)

    def _note_scheduled(self, plan: StepPlan) -> None:
        now_s = self._clock()
        for new in plan.new:
            if (generation := self._live.by_rank_id(new.request_id)) is not None:
                generation.note_scheduled(now_s)

    def _for_ranks(self, plan: StepPlan) -> StepPlan:
        """With the gang it is meant for, and what that needs to know of grammars.

        The vocabulary is megabytes that most engines never need: sent once, with the first request that does.
        """
        needs_it = not self._ranks_know_vocabulary and any(new.sampling.grammar is not None for new in plan.new)
        if not needs_it or self._grammars is None:
            return replace(plan, epoch=self._epoch) if self._epoch else plan
        self._ranks_know_vocabulary = True
        return replace(plan, epoch=self._epoch, vocabulary=self._grammars.vocabulary)

    def _take_prompt_logprobs(self, result: StepResult) -> None:
        for found in result.prompt_logprobs:
            generation = self._live.by_rank_id(found.request_id)
            if generation is None:  # aborted
                continue
            try:
                generation.add_prompt_logprobs(found)
            except Exception as error:
                self._fail(generation, error)

    def _deliver(self, new_tokens: list[tuple[Request, SampledToken]]) -> None:
        now_s = self._clock()
        self._num_generated_tokens += len(new_tokens)
        for request, token in new_tokens:
            generation = self._live.by_rank_id(request.id)
            if generation is None:  # ended by `close` while this thread was held
                self._scheduler.abort(request.id)
                continue
            if token.error is not None:
                self._fail(generation, (DistInferError if token.is_fault else ConfigError)(token.error))
                continue
            try:
                event, has_ended = generation.advance(request, token, now_s)
                if event is not None:
                    self._outbox.append((generation, event))
                if has_ended:
                    self._scheduler.finish(request)
                    if generation.has_ended:
                        self._outbox.append((generation, None))
            except Exception as error:
                self._fail(generation, error)

    def _tell(self) -> None:
        while self._outbox:
            generation, event = self._outbox.popleft()
            if event is None:
                self._live.finish(generation)
            elif self._live.by_client_id(generation.request_id) is generation:  # else its callback has raised
                try:
                    generation.on_event(event)
                except Exception as error:
                    self._fail(generation, error)

    def _abort(self, generation: Generation) -> None:
        self._tell()  # before its end, what came before
        self._stop_working_on(generation)
        self._live.abort(generation)

    def _fail(self, generation: Generation, error: Exception) -> None:
        """This request alone."""
        self._tell()
        self._stop_working_on(generation)
        self._live.fail(generation, error)

    def _stop_working_on(self, generation: Generation) -> None:
        for request in generation.requests:
            self._scheduler.abort(request.id)

    def _end_all(self, error: Exception | None) -> None:
        """No more steps: every live request fails with the error, or is aborted when the engine is being closed."""
        with self._wake:
            if self._closing:
                error = None
            else:
                self._failure = error
            self._inbox = []
        self._tell()
        for generation in self._live.all():
            if error is None:
                self._live.abort(generation)
            else:
                self._live.fail(generation, _explain(error))

    def _take_stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_steps=self._scheduler.num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_kv_blocks=self._scheduler.config.num_kv_blocks,
            num_free_kv_blocks=self._scheduler.num_free_blocks,
            num_finished=self._live.num_finished,
            num_aborted=self._live.num_aborted,
            num_failed=self._live.num_failed,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_gang_restarts=self._num_gang_restarts,
        )

    def _checked(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The params' bad words as token ids. ConfigError for what cannot be run."""
        self._scheduler.token_limit(len(prompt_token_ids), params.max_tokens)
        self._check_ids("prompt token ids", prompt_token_ids)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias token ids", [token_id for token_id, _ in params.logit_bias])
        if params.grammar is not None:
            if self._grammars is None:
                raise ConfigError("a grammar needs a tokenizer, and this model has none")
            self._grammars.check(params.grammar)
        if params.stop and self._encode is None:
            raise ConfigError("stop strings need a tokenizer, and this model has none: use stop_token_ids")
        return self._bad_word_ids(params.bad_words) if params.bad_words else ()

    def _encode_bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        if self._encode is None:
            raise ConfigError("bad_words need a tokenizer, and this model has none: use logit_bias with token ids")
        bad_words = bad_word_ids(words, self._encode)
        for word in bad_words:
            self._check_ids("token ids of bad_words", word)
        return bad_words

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < self._vocab_size:
                raise ConfigError(f"{name} must be whole numbers in [0, {self._vocab_size}), not {token_id!r}")


def _misfit(request: Request, error: ClusterError) -> ClusterError:
    return ClusterError(
        f"the ranks were lost ({error}), and those that took their place have no room for this request, which has "
        f"{request.num_prompt_tokens} prompt tokens and may become {request.token_limit}"
    )


def _explain(error: Exception) -> ClusterError:
    """One for each request, since raising an exception writes to it."""
    if isinstance(error, DistInferError):
        explained = ClusterError(f"the engine failed: {error}")
    else:
        explained = ClusterError(f"the engine failed: {type(error).__name__}: {error}")
    explained.__cause__ = error
    return explained
