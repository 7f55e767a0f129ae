"""An engine at the endpoint's port that says what it was told to: for formats that no small model writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_infer.engine.stats import EngineStats
from dist_infer.gang_state import GangState, Ready
from dist_infer.grammar import Grammar
from dist_infer.metrics.snapshot import NO_STATS
from dist_infer.outputs import CompletionOutput, Event, Finished, Logprob, RequestMetrics, RequestOutput, TokenEvent
from dist_infer.sampling_params import SamplingParams


@dataclass(frozen=True)
class _Plan:
    max_requests: int = 8
    max_model_len: int = 10_000


@dataclass(kw_only=True)
class ScriptedEngine:
    """Answers every request with `text`, `piece` characters a token. endless: goes on with `.` until it is aborted.

    What it was asked is kept. Each request has a thread of its own, which ends with it.
    """

    text: str
    piece: int = 3
    endless: bool = False
    reason: str = "stop"
    chat_template: str | None = "{{ messages }}"
    special_token_ids: Mapping[str, int] = field(default_factory=dict)
    model_type: str = "none"
    prompt: str = "<|assistant|>"
    plan: _Plan = _Plan()
    failure: Exception | None = None
    state: GangState = field(default_factory=Ready)
    asked: list[SamplingParams] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    conversations: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def submit(
        self,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
        *,
        priority: int = 0,
    ) -> str:
        self.asked.append(params)
        self.priorities.append(priority)
        name = f"r{len(self.asked)}"
        threading.Thread(target=self._answer, args=(name, ids, params, on_event)).start()
        return name

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return True

    def check(self, ids: Sequence[int], params: SamplingParams) -> None:
        pass

    def knows_grammar(self, grammar: Grammar) -> bool:
        return True

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode()

    def chat_prompt(self, messages: Sequence[dict[str, Any]], **options: Any) -> tuple[str, list[int]]:
        self.conversations.append({"messages": list(messages), **options})
        return self.prompt, [1, 2, 3]

    @property
    def stats(self) -> EngineStats:
        return NO_STATS

    def _answer(self, name: str, ids: list[int], params: SamplingParams, on_event: Callable[[Event], None]) -> None:
        said: list[list[str]] = [[] for _ in range(params.n)]
        reason = self.reason
        for piece in self._pieces():
            if name in self.aborted:
                reason = "abort"
                break
            for index in range(params.n):
                said[index].append(piece)
                logprobs = None if params.logprobs is None else ({7: Logprob(7, -0.5, piece)},)
                on_event(TokenEvent(request_id=name, index=index, token_ids=(7,), text=piece, logprobs=logprobs))
        outputs = [
            CompletionOutput(
                index=index,
                text="".join(pieces),
                token_ids=[7] * len(pieces),
                finish_reason=reason,  # type: ignore[arg-type]
                stop_reason=None,
                logprobs=None if params.logprobs is None else [{7: Logprob(7, -0.5, piece)} for piece in pieces],
            )
            for index, pieces in enumerate(said)
        ]
        metrics = RequestMetrics(
            arrival_s=0.0,
            first_scheduled_s=None,
            first_token_s=None,
            finished_s=None,
            num_generated_tokens=0,
            num_preemptions=0,
        )
        output = RequestOutput(
            request_id=name, prompt=None, prompt_token_ids=ids, outputs=outputs, finished=True, metrics=metrics
        )
        on_event(Finished(request_id=name, reason=reason, stop_reason=None, output=output))  # type: ignore[arg-type]

    def _pieces(self) -> Iterator[str]:
        yield from (self.text[at : at + self.piece] for at in range(0, len(self.text), self.piece))
        pause = threading.Event()
        while self.endless:
            pause.wait(0.002)
            yield "."
