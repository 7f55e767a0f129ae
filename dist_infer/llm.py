"""The Python API: `LLM(config).generate(prompts, SamplingParams(...))`, with the names people know from vLLM."""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from dist_infer.chat_messages import Conversation, Documents, Messages, Tools, make_conversation
from dist_infer.chat_template import TemplateRenderer
from dist_infer.config import RunConfig, load_config
from dist_infer.engine.loop import EngineLoop
from dist_infer.engine.scheduler import Scheduler
from dist_infer.engine.stats import EngineStats
from dist_infer.gang import Gang
from dist_infer.gang_state import Failed as GangFailed
from dist_infer.gang_state import GangState, WarmingUp
from dist_infer.grammar import Grammar
from dist_infer.grammar_checker import GrammarChecker
from dist_infer.messages import StreamReport, TimelineReport, WorkerReport
from dist_infer.outputs import Event, Failed, Finished, RequestOutput, TokenEvent
from dist_infer.sampling_params import SamplingParams
from dist_infer.startup import OnProgress, Progress, progress_of
from dist_infer.summary import RunSummary, summarise
from dist_infer.supervisor import Supervisor
from dist_infer.tokenizer import Tokenizer
from partition.errors import CheckpointError, ClusterError, ConfigError
from partition.plan import Plan

Prompt = str | Sequence[int]
_REPORT_TIMEOUT_S = 2.0
_FINAL_REPORT_TIMEOUT_S = 30.0
_EVENT_POLL_S = 1.0  # only so that Ctrl-C is seen by a waiting main thread on every platform


class LLM:
    """A model that is loaded and ready. A context manager; `close` leaves no process and no thread behind.

    config: path of a run file, a mapping of the same shape, or a RunConfig; its `run` section is not used.
    overrides: `a.b=c` texts. on_progress: called while packing, starting and loading.
    timeline: record when each unit is read and computed, for `timelines`; then a rank that is lost, and with it what it
    has recorded, is an error at once. Otherwise others take its place, as often as cluster.max_restarts allows.
    apart: no rank computes in this process, also where there is one rank alone: for a process that has other things to
    do, such as clients.
    Raises the tree of dist_infer.errors; what was started until then is ended.
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | RunConfig,
        *,
        overrides: Sequence[str] = (),
        on_progress: OnProgress | None = None,
        timeline: bool = False,
        apart: bool = False,
    ) -> None:
        run = config if isinstance(config, RunConfig) else load_config(config, overrides)
        show = on_progress or _silent
        self._timeline = timeline
        with ExitStack() as stack:
            self._supervisor = Supervisor(run.cluster, lambda state: show(progress_of(state)))
            self.gang = Gang(run, self._supervisor.note, timeline=timeline, apart=apart)
            stack.callback(self.gang.close)
            side = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="dist-infer-tokenizer"))
            # A GGUF's tokenizer takes seconds to convert: meanwhile workers start. Not beside ranks in this process:
            # transformers imports its modules lazily, and two threads doing that see each other's half-made ones.
            tokenizer = side.submit(_load_tokenizer, self.gang.model.path)
            if self.gang.computes_here:
                tokenizer.result()
            self.gang.start()
            self._supervisor.note(WarmingUp())
            self._tokenizer, self._no_tokenizer = tokenizer.result()
            self._renderer = stack.enter_context(TemplateRenderer())
            plan = self.gang.plan
            self._grammars = None
            if (known := self._tokenizer) is not None:
                self._grammars = GrammarChecker(lambda: known.vocabulary(plan.model.vocab_size))
                stack.callback(self._grammars.close)
            eos = self.gang.model.eos_token_ids + (self._tokenizer.eos_token_ids() if self._tokenizer else ())
            self._loop = EngineLoop(
                executor=self.gang.executor,
                scheduler=Scheduler(self.gang.scheduler_config),
                decode=self._decode,
                decode_special=self._decode_special if self._tokenizer else None,
                encode=self._encode_bare if self._tokenizer else None,
                grammars=self._grammars,
                token_kinds=self._tokenizer.token_kinds(plan.model.vocab_size) if self._tokenizer else None,
                vocab_size=plan.model.vocab_size,
                eos_token_ids=eos,
                step_timeout_s=self.gang.step_timeout_s,
                recover=None if timeline else self._supervisor,
            )
            stack.callback(self._loop.close)
            self._supervisor.look_after(self.gang)
            self._loop.start()
            self._stack = stack.pop_all()
        self._ids = itertools.count()

    @property
    def plan(self) -> Plan:
        return self.gang.plan

    @property
    def state(self) -> GangState:
        """How the ranks stand: ready, being replaced (requests wait), draining or failed."""
        failure = self._loop.failure
        return self._supervisor.state if failure is None else GangFailed(cause=str(failure))

    @property
    def stats(self) -> EngineStats:
        return self._loop.stats

    @property
    def worker_reports(self) -> tuple[WorkerReport, ...]:
        """What every rank said of itself when it was loaded."""
        return self.gang.reports

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts in one batch; outputs are in the order of the prompts.

        A prompt is a text or a list of token ids. sampling_params: one for all, or one for each. Raises ConfigError
        for a bad prompt before anything runs, and the first request's error if one fails.
        """
        many = _as_list(prompts)
        params = _params_for(many, sampling_params)
        return self._answers([self._encode(prompt) for prompt in many], params)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Tools | None = None,
        documents: Documents | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Like `generate` for conversations: one list of {role, content}, or a list of such lists; see `chat_prompt`.

        tools, documents, template and flags are those of all of them. The outputs' `prompt` is what the template wrote.
        """
        conversations = _conversations(messages)
        params = _params_for(conversations, sampling_params)
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                prompt = self.chat_prompt(
                    conversation,
                    tools=tools,
                    documents=documents,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                )
            except ConfigError as error:
                if len(conversations) == 1:
                    raise
                raise ConfigError(f"conversation {index + 1} of {len(conversations)}: {error}") from error
            prompts.append(prompt)
        return self._answers(prompts, params)

    async def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AsyncIterator[Event]:
        """The events of one request as they come; the last one is Finished, or Failed is raised.

        Leaving the iteration early aborts the request.
        """
        text, ids = self._encode(prompt)
        events: asyncio.Queue[Event] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            here.call_soon_threadsafe(events.put_nowait, event)

        request_id = f"request-{next(self._ids)}"
        self._loop.submit(request_id, ids, text, sampling_params or SamplingParams(), deliver)
        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = not isinstance(event, TokenEvent)
                if isinstance(event, Failed):
                    raise event.error
                yield event
        finally:
            if not ended:
                self._loop.abort(request_id)

    def events(
        self, prompts: Sequence[tuple[str | None, list[int]]], params: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, Event]]:
        """(index of the prompt, event) in the order in which things happen, until every request has its end.

        prompts: (text or None, token ids). All are submitted before the first event; leaving early aborts the rest.
        """
        for (_, ids), sampling in zip(prompts, params, strict=True):
            self._loop.check(ids, sampling)  # a bad one is refused before any of them runs
        arrived: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        open_ids: dict[int, str] = {}
        try:
            with self._loop.together():
                for index, ((text, ids), sampling) in enumerate(zip(prompts, params, strict=True)):
                    request_id = f"request-{next(self._ids)}"
                    self._loop.submit(
                        request_id,
                        ids,
                        text,
                        sampling,
                        lambda event, index=index: arrived.put((index, event)),  # type: ignore[misc]
                    )
                    open_ids[index] = request_id
            while open_ids:
                try:
                    index, event = arrived.get(timeout=_EVENT_POLL_S)
                except queue.Empty:
                    continue
                if not isinstance(event, TokenEvent):
                    del open_ids[index]
                yield index, event
        finally:
            for request_id in open_ids.values():
                self._loop.abort(request_id)

    def submit(
        self,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
        *,
        priority: int = 0,
    ) -> str:
        """Queue one request; its events go to `on_event`, in the engine's thread, which waits for it. Returns its id.

        priority: lower is sooner, among requests that wait and when KV blocks run out; equals in the order they came.
        Raises ConfigError for what `check` refuses, ClusterError when the engine has failed or is closed.
        """
        request_id = f"request-{next(self._ids)}"
        self._loop.submit(request_id, ids, text, params, on_event, priority)
        return request_id

    def abort(self, request_id: str) -> bool:
        """End a request with reason "abort"; False when it has ended."""
        return self._loop.abort(request_id)

    def check(self, ids: Sequence[int], params: SamplingParams) -> None:
        """ConfigError if this request can never be run; nothing is queued."""
        self._loop.check(ids, params)

    def knows_grammar(self, grammar: Grammar) -> bool:
        """`check` of it takes no time: it was found good before."""
        return self._grammars is not None and self._grammars.knows(grammar)

    @property
    def model_type(self) -> str:
        """As its config.json names it."""
        return self.plan.model.model_type

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Of the tokenizer's special tokens, by their text; empty without a tokenizer."""
        return {} if self._tokenizer is None else self._tokenizer.special_token_ids()

    @property
    def chat_template(self) -> str | None:
        """What conversations with tools are written by; None for a model without one."""
        try:
            return None if self._tokenizer is None else self._tokenizer.chat_template(None, with_tools=True)
        except ConfigError:
            return None

    @property
    def failure(self) -> Exception | None:
        """Why the engine takes no more requests; None while it is well."""
        return self._loop.failure

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out. ConfigError for an id outside the vocabulary."""
        vocab_size = self.plan.model.vocab_size
        if (bad := next((token for token in token_ids if not 0 <= token < vocab_size), None)) is not None:
            raise ConfigError(f"tokens must be whole numbers in [0, {vocab_size}), not {bad}")
        return self._require_tokenizer().decode(token_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by the model's tokenizer."""
        return self._require_tokenizer().encode(text, add_special_tokens=add_special_tokens)

    def chat_prompt(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        documents: Documents | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> tuple[str, list[int]]:
        """A conversation through the model's chat template: its text and its token ids, as `events` takes them.

        tools: JSON Schemas of functions; documents: objects such as {title, text}; templates that know neither ignore
        them. chat_template: a template, or the name of one of the model's, instead of the model's default.
        add_generation_prompt: end with the beginning of an answer. continue_final_message: leave the last message
        open, for the model to go on with it; one of the two.
        Raises ConfigError for messages of a wrong shape, without a template, and when the template refuses or fails
        or goes beyond the limits of RenderLimits.
        """
        if add_generation_prompt and continue_final_message:
            raise ConfigError(
                "continue_final_message goes on with the last message, add_generation_prompt begins a new one: "
                "with continue_final_message=True give add_generation_prompt=False"
            )
        conversation: Conversation = make_conversation(messages, tools, documents)
        tokenizer = self._require_tokenizer()
        text = self._renderer.render(
            tokenizer.chat_template(chat_template, with_tools=tools is not None),
            conversation,
            variables=tokenizer.template_variables(),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return text, tokenizer.encode(text, add_special_tokens=False)

    def stream_reports(self, timeout_s: float = _REPORT_TIMEOUT_S) -> tuple[StreamReport, ...]:
        """Cumulative streaming figures of every rank, by rank. Any thread may ask at any time, also while steps run.

        Ranks that have not answered within `timeout_s` are given as they were last known, or not at all; none while
        they are being replaced. Raises ClusterError when a rank is lost for good.
        """
        try:
            return self.gang.executor.stream_reports(timeout_s)
        except ClusterError:
            if self._timeline or self.failure is not None:
                raise
            return ()

    def timelines(self) -> tuple[TimelineReport, ...]:
        """What every rank did since the last call; empty without `timeline=True`."""
        return self.gang.executor.timelines()

    def summarise(
        self, outputs: Sequence[RequestOutput], before: Sequence[StreamReport], started_s: float
    ) -> RunSummary:
        """Figures of what ran since `before` was taken, at time.monotonic() = started_s."""
        return summarise(
            plan=self.plan,
            outputs=outputs,
            before=before,
            after=self.stream_reports(_FINAL_REPORT_TIMEOUT_S),
            wall_s=time.monotonic() - started_s,
            facts=self.gang.facts,
        )

    def integrity(self) -> None:
        """RuntimeError if an idle engine lost a KV block or a request."""
        self._loop.integrity()

    def close(self) -> None:
        """End running requests, ranks and threads. Idempotent."""
        self._supervisor.drain()
        self._stack.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answers(
        self, prompts: Sequence[tuple[str | None, list[int]]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """In the order of the prompts; the first request's error is raised if one fails."""
        outputs: dict[int, RequestOutput] = {}
        for index, event in self.events(prompts, params):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                outputs[index] = event.output
        return [outputs[index] for index in range(len(prompts))]

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        return (prompt, self.encode(prompt)) if isinstance(prompt, str) else (None, _listed(prompt))

    def _encode_bare(self, text: str) -> list[int]:
        return self._require_tokenizer().encode(text, add_special_tokens=False)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids) if self._tokenizer is not None else ""

    def _decode_special(self, token_ids: Sequence[int]) -> str:
        return self._require_tokenizer().decode(token_ids, skip_special_tokens=False)

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError(str(self._no_tokenizer))
        return self._tokenizer


def _load_tokenizer(path: Path) -> tuple[Tokenizer | None, CheckpointError | None]:
    """A model without tokenizer files still serves token ids (tests, research); text prompts are then refused."""
    try:
        return Tokenizer(path), None
    except CheckpointError as error:
        return None, error


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    many = _listed(prompts)
    if many and all(isinstance(item, int) for item in many):
        return [many]
    return many


def _conversations(messages: Messages | Sequence[Messages]) -> list[Any]:
    """What is in each is checked where it is used."""
    many: list[Any] = _listed(messages)
    return [many] if many and isinstance(many[0], Mapping) else many


def _listed(value: Any) -> list[Any]:
    """Of prompts or of token ids. What is in the list is checked where it is used."""
    if isinstance(value, bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"a prompt is a text or a list of token ids, not {repr(value)[:80]}")
    return list(value)


def _params_for(
    prompts: Sequence[object], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise ConfigError(
            f"{len(prompts)} prompts, but {len(params)} sampling_params: give one, or one for each prompt"
        )
    return list(params)


def _silent(progress: Progress) -> None:
    """Nobody asked."""
