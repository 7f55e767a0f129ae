"""What one request shows to its client: text, reasons, log-probabilities, times. Used by the engine's thread alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dist_infer.engine.detokenizer import Detokenizer
from dist_infer.engine.request import Request
from dist_infer.engine.stop_checker import StopChecker
from dist_infer.messages import SampledToken
from dist_infer.outputs import (
    CompletionOutput,
    Event,
    Finished,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenEvent,
    TokenLogprobs,
)

Decode: TypeAlias = Callable[[Sequence[int]], str]
OnEvent: TypeAlias = Callable[[Event], None]
_INDEX = 0  # one answer a request; several of one prompt are several requests


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer ends; see CompletionOutput."""

    reason: FinishReason
    stop_reason: int | str | None = None


class Generation:
    """The client's side of a Request. `request_id` is the client's name for it, `request.id` the ranks'."""

    def __init__(
        self,
        *,
        request_id: str,
        request: Request,
        prompt: str | None,
        on_event: OnEvent,
        decode: Decode,
        arrival_s: float,
    ) -> None:
        self.request_id = request_id
        self.request = request
        self.on_event = on_event
        self._prompt = prompt
        self._decode = decode
        self._detokenizer = Detokenizer(decode, request.prompt_token_ids)
        self._stop_checker = StopChecker(request.params.stop)
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None if request.params.logprobs is None else []
        self._arrival_s = arrival_s
        self._first_scheduled_s: float | None = None
        self._first_token_s: float | None = None

    def note_scheduled(self, now_s: float) -> None:
        """A step with it is on its way; only the first counts."""
        if self._first_scheduled_s is None:
            self._first_scheduled_s = now_s

    def advance(self, token: SampledToken, now_s: float) -> tuple[TokenEvent, Ending | None]:
        """Take in a token that the scheduler has appended to the request. Raises what `decode` raises."""
        if self._first_token_s is None:
            self._first_token_s = now_s
        ending = self._ending(token.token_id)
        text = ""
        if ending is None or ending.reason != "stop":
            text = self._detokenizer.push((token.token_id,))
        if ending is not None:
            text += self._detokenizer.flush()
        text, stop = self._stop_checker.push(text)
        if stop is not None:
            ending = Ending("stop", stop)
        elif ending is not None:
            text += self._stop_checker.flush()
        logprobs: tuple[TokenLogprobs, ...] | None = None
        if self._logprobs is not None:
            logprobs = (self._logprobs_of(token),)
            self._logprobs += logprobs
        return self._event((token.token_id,), text, logprobs), ending

    def release_text(self) -> TokenEvent | None:
        """Text held back when an abort ends the answer, if any. Raises what `decode` raises."""
        text, stop = self._stop_checker.push(self._detokenizer.flush())
        if stop is None:
            text += self._stop_checker.flush()
        return self._event((), text, None if self._logprobs is None else ()) if text else None

    def finished(self, ending: Ending, now_s: float) -> Finished:
        """The end as an event, with the whole output."""
        request = self.request
        answer = CompletionOutput(
            index=_INDEX,
            text="".join(self._pieces),
            token_ids=request.output_token_ids,
            finish_reason=ending.reason,
            stop_reason=ending.stop_reason,
            logprobs=self._logprobs,
        )
        metrics = RequestMetrics(
            arrival_s=self._arrival_s,
            first_scheduled_s=self._first_scheduled_s,
            first_token_s=self._first_token_s,
            finished_s=now_s,
            num_generated_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
        )
        output = RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[answer],
            finished=True,
            metrics=metrics,
        )
        return Finished(request_id=self.request_id, reason=ending.reason, stop_reason=ending.stop_reason, output=output)

    def _ending(self, token_id: int) -> Ending | None:
        request, params = self.request, self.request.params
        if token_id in request.eos_token_ids and not params.ignore_eos:
            return Ending("stop")
        if token_id in params.stop_token_ids:
            return Ending("stop", token_id)
        return Ending("length") if request.num_tokens >= request.token_limit else None

    def _event(self, token_ids: tuple[int, ...], text: str, logprobs: tuple[TokenLogprobs, ...] | None) -> TokenEvent:
        if text:
            self._pieces.append(text)
        return TokenEvent(request_id=self.request_id, index=_INDEX, token_ids=token_ids, text=text, logprobs=logprobs)

    def _logprobs_of(self, token: SampledToken) -> TokenLogprobs:
        if token.logprob is None:
            raise RuntimeError(f"log-probabilities were asked for, the ranks sent none for token {token.token_id}")
        chosen = (token.token_id, token.logprob)
        return {
            token_id: Logprob(token_id, logprob, self._decode((token_id,)))
            for token_id, logprob in dict((chosen, *token.top_logprobs)).items()
        }
