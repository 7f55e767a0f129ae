"""What one request shows to its client: its answers, its prompt's log-probabilities, its times.

Used by the engine's thread alone. With best_of, which answers are given is known at the end: until then nothing is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from dist_infer.engine.answer import Answer, Decode, token_logprobs
from dist_infer.engine.detokenizer import TokenKinds
from dist_infer.engine.request import Request
from dist_infer.messages import NOT_FINITE, PromptLogprobs, SampledToken
from dist_infer.outputs import Event, Finished, RequestMetrics, RequestOutput, TokenEvent, TokenLogprobs
from partition.errors import DistInferError

OnEvent: TypeAlias = Callable[[Event], None]


class Generation:
    """The client's side of a request: `requests` are its answers, in order, to scheduler and ranks.

    `request_id` is the client's name for it, the `id` of each of `requests` the ranks'.
    """

    def __init__(
        self,
        *,
        request_id: str,
        requests: Sequence[Request],
        prompt: str | None,
        on_event: OnEvent,
        decode: Decode,
        token_kinds: TokenKinds | None,
        arrival_s: float,
    ) -> None:
        self.request_id = request_id
        self.requests = tuple(requests)
        self.on_event = on_event
        self._params = self.requests[0].params
        self._answers = {request.id: Answer(request, decode, token_kinds) for request in self.requests}
        self._index = {request.id: index for index, request in enumerate(self.requests)}
        self._is_ranked = self._params.num_samples > self._params.n
        self._prompt = prompt
        self._decode = decode
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        if self._params.prompt_logprobs is not None:
            self._prompt_logprobs = [None] * self.requests[0].num_prompt_tokens
        self._arrival_s = arrival_s
        self._first_scheduled_s: float | None = None
        self._first_token_s: float | None = None

    @property
    def has_ended(self) -> bool:
        """All of its answers have."""
        return all(answer.ending is not None for answer in self._answers.values())

    def note_scheduled(self, now_s: float) -> None:
        """A step with it is on its way; only the first counts."""
        if self._first_scheduled_s is None:
            self._first_scheduled_s = now_s

    def add_prompt_logprobs(self, found: PromptLogprobs) -> None:
        """Of a part of the prompt; after a preemption the same ones may come again. Raises what `decode` raises."""
        if self._prompt_logprobs is None:
            raise RuntimeError(f"log-probabilities of the prompt of {self.request_id!r}, which nobody asked for")
        if any(map(math.isnan, found.logprobs)):
            raise DistInferError(NOT_FINITE.format("a part of the prompt"))
        decode = functools.cache(self._decode)
        prompt = self.requests[0].prompt_token_ids
        for at, (logprob, top) in enumerate(zip(found.logprobs, found.top_logprobs, strict=True), found.first):
            self._prompt_logprobs[at] = token_logprobs(prompt[at], logprob, top, decode)

    def advance(self, request: Request, token: SampledToken, now_s: float) -> tuple[TokenEvent | None, bool]:
        """Take in a token of one of its requests; the event to give, and whether this answer has ended.

        Raises what `decode` raises.
        """
        if self._first_token_s is None:
            self._first_token_s = now_s
        answer = self._answers[request.id]
        event = answer.advance(token).event(self.request_id, self._index[request.id])
        return None if self._is_ranked else event, answer.ending is not None

    def last_events(self) -> list[TokenEvent]:
        """What is still to give before the end; aborts the answers that have none. Raises what `decode` raises."""
        released = [(index, answer.abort()) for index, answer in enumerate(self._answers.values())]
        if not self._is_ranked:
            return [piece.event(self.request_id, index) for index, piece in released if piece is not None]
        return [
            TokenEvent(
                request_id=self.request_id,
                index=output.index,
                token_ids=tuple(output.token_ids),
                text=output.text,
                logprobs=None if output.logprobs is None else tuple(output.logprobs),
            )
            for output in (answer.output(index) for index, answer in enumerate(self._given()))
        ]

    def finished(self, now_s: float) -> Finished:
        """The end as an event, with the whole output; reason and stop reason are the first answer's."""
        outputs = [answer.output(index) for index, answer in enumerate(self._given())]
        metrics = RequestMetrics(
            arrival_s=self._arrival_s,
            first_scheduled_s=self._first_scheduled_s,
            first_token_s=self._first_token_s,
            finished_s=now_s,
            num_generated_tokens=max(request.num_output_tokens for request in self.requests),
            num_preemptions=sum(request.num_preemptions for request in self.requests),
        )
        output = RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=list(self.requests[0].prompt_token_ids),
            outputs=outputs,
            finished=True,
            metrics=metrics,
            prompt_logprobs=self._prompt_logprobs,
        )
        reason = outputs[0].finish_reason
        if reason is None:
            raise RuntimeError(f"request {self.request_id!r} is finished, its first answer is not")
        return Finished(request_id=self.request_id, reason=reason, stop_reason=outputs[0].stop_reason, output=output)

    def _given(self) -> list[Answer]:
        """The answers that the client gets, in their order: with best_of the likeliest first."""
        answers = list(self._answers.values())
        if self._is_ranked:
            answers.sort(key=lambda answer: -answer.mean_logprob)
        return answers[: self._params.n]
