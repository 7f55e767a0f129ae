"""One of the answers to a request, as its client sees it: text, log-probabilities, why it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dist_infer.engine.detokenizer import Detokenizer, TokenKinds
from dist_infer.engine.request import Request
from dist_infer.engine.stop_checker import StopChecker
from dist_infer.messages import SampledToken
from dist_infer.outputs import CompletionOutput, FinishReason, Logprob, TokenEvent, TokenLogprobs

Decode: TypeAlias = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer ends; see CompletionOutput."""

    reason: FinishReason
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step adds to an answer; see TokenEvent."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None

    def event(self, request_id: str, index: int) -> TokenEvent:
        return TokenEvent(
            request_id=request_id, index=index, token_ids=self.token_ids, text=self.text, logprobs=self.logprobs
        )


class Answer:
    """The client's side of one Request, which the scheduler owns. `ending` is None until it has one."""

    def __init__(self, request: Request, decode: Decode, token_kinds: TokenKinds | None) -> None:
        self.request = request
        self.ending: Ending | None = None
        self._decode = decode
        self._detokenizer = Detokenizer(decode, request.prompt_token_ids, token_kinds)
        self._stop_checker = StopChecker(request.params.stop)
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None if request.params.logprobs is None else []
        self._cumulative_logprob: float | None = None if request.sampling.num_logprobs is None else 0.0

    def advance(self, token: SampledToken) -> Piece:
        """Take in a token that the scheduler has appended to the request; may set `ending`.

        Raises what `decode` raises.
        """
        ending = self._ending(token.token_id)
        text = ""
        if ending is None or ending.reason != "stop":  # the token that says "stop" is no text
            if token.completes:
                ending = Ending("stop")
            text = self._detokenizer.push((token.token_id,))
        if ending is not None:
            text += self._detokenizer.flush()
        text, stop = self._stop_checker.push(text, may_stop=self._may_stop)
        if stop is not None:
            ending = Ending("stop", stop)
        elif ending is not None:
            text += self._stop_checker.flush()
        logprobs: tuple[TokenLogprobs, ...] | None = None
        if self._cumulative_logprob is not None:
            if token.logprob is None:
                raise RuntimeError(f"log-probabilities were asked for, the ranks sent none for token {token.token_id}")
            self._cumulative_logprob += token.logprob
            if self._logprobs is not None:
                logprobs = (token_logprobs(token.token_id, token.logprob, token.top_logprobs, self._decode),)
                self._logprobs += logprobs
        self._texts.append(text)
        self.ending = ending
        return Piece((token.token_id,), text, logprobs)

    def abort(self) -> Piece | None:
        """End it, unless it has ended; the text held back until then, if any. Raises what `decode` raises."""
        if self.ending is not None:
            return None
        self.ending = Ending("abort")
        text, stop = self._stop_checker.push(self._detokenizer.flush(), may_stop=self._may_stop)
        if stop is None:
            text += self._stop_checker.flush()
        self._texts.append(text)
        return Piece((), text, None if self._logprobs is None else ()) if text else None

    @property
    def mean_logprob(self) -> float:
        """What best_of ranks by: of its tokens, whatever their number."""
        if self._cumulative_logprob is None or not self.request.num_output_tokens:
            return -math.inf
        return self._cumulative_logprob / self.request.num_output_tokens

    def output(self, index: int) -> CompletionOutput:
        """RuntimeError before it has ended: whoever asks has `abort` to end it."""
        if (ending := self.ending) is None:
            raise RuntimeError(f"the output of answer {index}, {self.request.id!r}, which has not ended")
        return CompletionOutput(
            index=index,
            text="".join(self._texts),
            token_ids=self.request.output_token_ids,
            finish_reason=ending.reason,
            stop_reason=ending.stop_reason,
            logprobs=self._logprobs,
            cumulative_logprob=self._cumulative_logprob,
        )

    @property
    def _may_stop(self) -> bool:
        return self.request.num_output_tokens > self.request.params.min_tokens

    def _ending(self, token_id: int) -> Ending | None:
        request, params = self.request, self.request.params
        if self._may_stop and token_id in request.eos_token_ids and not params.ignore_eos:
            return Ending("stop")
        if self._may_stop and token_id in params.stop_token_ids:
            return Ending("stop", token_id)
        return Ending("length") if request.num_tokens >= request.token_limit else None


def token_logprobs(token_id: int, logprob: float, top: Sequence[tuple[int, float]], decode: Decode) -> TokenLogprobs:
    """Of one position: the token itself first, then the likeliest."""
    found = dict(((token_id, logprob), *top))
    return {token: Logprob(token, value, decode((token,))) for token, value in found.items()}
