"""How long requests waited and took, from the events that their clients get anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dist_infer.metrics.histogram import SECONDS, TOKENS, Histogram
from dist_infer.outputs import Event, Finished, RequestOutput, TokenEvent


class RequestHistograms:
    """Of all requests together. Added to by the event loop's thread alone."""

    def __init__(self) -> None:
        self.ttft = Histogram(SECONDS)
        self.inter_token = Histogram(SECONDS)
        self.whole = Histogram(SECONDS)
        self.queue = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.output_tokens = Histogram(TOKENS)


class AnswerTimes:
    """Follows the answers of one HTTP request. Each prompt counts as a request, at its first token and at its end.

    arrival_s: of the clock that `take` is given. on_finished: is told every whole output.
    """

    __slots__ = ("_arrival_s", "_found", "_last_s", "_on_finished", "_started", "ttft_s")

    def __init__(
        self,
        found: RequestHistograms,
        arrival_s: float,
        on_finished: Callable[[RequestOutput], None] | None = None,
    ) -> None:
        self._found, self._arrival_s, self._on_finished = found, arrival_s, on_finished
        self._last_s: dict[tuple[int, int], float] = {}  # when an answer's newest token came
        self._started: set[int] = set()  # prompts with a token
        self.ttft_s: float | None = None  # of the first prompt that has a token

    def take(self, events: Sequence[tuple[int, Event]], now_s: float) -> None:
        """(index of the prompt, event), as they came at `now_s`."""
        last_s, inter_token = self._last_s, self._found.inter_token
        for prompt, event in events:
            if isinstance(event, TokenEvent):
                if not (num_tokens := len(event.token_ids)):
                    continue
                answer = (prompt, event.index)
                if (before_s := last_s.get(answer)) is not None:
                    inter_token.add((now_s - before_s) / num_tokens, num_tokens)
                elif prompt not in self._started:
                    self._first_token(prompt, now_s)
                last_s[answer] = now_s
            elif isinstance(event, Finished):
                self._finished(prompt, event.output, now_s)

    def _first_token(self, prompt: int, now_s: float) -> None:
        self._started.add(prompt)
        self._found.ttft.add(now_s - self._arrival_s)
        if self.ttft_s is None:
            self.ttft_s = now_s - self._arrival_s

    def _finished(self, prompt: int, output: RequestOutput, now_s: float) -> None:
        num_output = sum(len(answer.token_ids) for answer in output.outputs)
        if num_output and prompt not in self._started:  # nothing was streamed
            self._first_token(prompt, now_s)
        self._found.whole.add(now_s - self._arrival_s)
        self._found.prompt_tokens.add(len(output.prompt_token_ids))
        self._found.output_tokens.add(num_output)
        times = output.metrics
        if times.first_scheduled_s is not None:
            self._found.queue.add(max(0.0, times.first_scheduled_s - times.arrival_s))
        if self._on_finished is not None:
            self._on_finished(output)
