"""What a request gives back: events while it runs, a RequestOutput at its end. Names as people know them from vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of one token's probability under the unmodified distribution."""

    token_id: int
    logprob: float
    decoded_token: str


TokenLogprobs: TypeAlias = dict[int, Logprob]
"""By token id, of one position: the chosen token first, then the likeliest in the order of the ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One answer.

    `text` holds neither stop strings nor the token that ended it; `token_ids` does end with that token.
    `finish_reason`: "stop" is the end-of-sequence token (`stop_reason` None), a stop token (its id) or a stop string
    (that string); "length" is max_tokens or the model length; None: not finished. `logprobs` has one entry for each of
    `token_ids`, None when not asked for; `cumulative_logprob` is the sum of the chosen tokens', where those were
    computed.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[TokenLogprobs] | None
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Points in time of the engine's clock, in seconds; None: never came to it.

    Of several answers, the first token of any, and `num_generated_tokens` of the longest.
    """

    arrival_s: float
    first_scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None
    num_generated_tokens: int
    num_preemptions: int

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; None with fewer than two tokens."""
        if self.first_token_s is None or self.finished_s is None or self.num_generated_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.num_generated_tokens - 1)

    @property
    def latency_s(self) -> float | None:
        """From arrival to the end."""
        return None if self.finished_s is None else self.finished_s - self.arrival_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A request with its answers, by index; `prompt` is None when it came as token ids.

    `prompt_logprobs` has one entry for each of `prompt_token_ids`, when asked for: None for the first, and where an
    abort came before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """New tokens of answer `index`. `text` is final: later events only add to it; the texts of a request's events
    joined are its output's text. `token_ids` is empty when an abort lets go of text that was held back. With best_of
    each answer is one event, at the end.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The one end of a request that was answered or aborted; the reasons are its first answer's."""

    request_id: str
    reason: FinishReason
    stop_reason: int | str | None
    output: RequestOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The one end of a request that could not be answered."""

    request_id: str
    error: Exception


Event: TypeAlias = TokenEvent | Finished | Failed
