"""What the last stage keeps of a request whose logits are edited before a token is drawn: how often it has which token.

Kept by token that occurs, not by token of the vocabulary: at most 24 bytes for each token of a context, where counts
over the vocabulary would take megabytes for each request, which no plan has set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dist_infer.messages import SamplingSpec, StepPlan

Ids = NDArray[np.int64]

_ANY_TOKEN = -1  # in a prefix shorter than its neighbours: matches whatever is there
_NO_TOKEN = -2  # before the first token: matches nothing
_ROOM = 64


class TokenHistory:
    """One request's edits as arrays, made once, and its tokens, kept current by `add`.

    bias_ids, bias [b]. Bad words of one token can never come; of longer ones, all but the last token is in `_prefixes`
    [w, L] and the last in `_lasts` [w].
    """

    def __init__(self, spec: SamplingSpec, token_ids: Sequence[int], num_output_tokens: int) -> None:
        self.spec = spec
        self.num_outputs = 0
        self.has_penalty = _has_penalty(spec)
        self.bias_ids = np.array([token for token, _ in spec.logit_bias], np.int64)
        self.bias = np.array([bias for _, bias in spec.logit_bias], np.float32)
        self._bad_ids = np.array([word[0] for word in spec.bad_words if len(word) == 1], np.int64)
        self._never_yet = np.concatenate([self._bad_ids, np.array(spec.held_back, np.int64)])
        longer = [word for word in spec.bad_words if len(word) > 1]
        width = max((len(word) - 1 for word in longer), default=0)
        self._prefixes = np.array(
            [(_ANY_TOKEN,) * (width - len(word) + 1) + word[:-1] for word in longer], np.int64
        ).reshape(len(longer), width)
        self._matches_any = self._prefixes == _ANY_TOKEN
        self._lasts = np.array([word[-1] for word in longer], np.int64)
        self._tail = np.full(width, _NO_TOKEN, np.int64)
        self._place: dict[int, int] = {}  # of a token in the two below
        self._ids = np.empty(_ROOM, np.int64)
        self._counts = np.zeros(_ROOM, np.float32)  # in the answer; of tokens that only the prompt has: 0
        num_prompt_tokens = len(token_ids) - num_output_tokens
        self._note(token_ids[:num_prompt_tokens], 0.0)
        self.add(token_ids[num_prompt_tokens:])

    def add(self, token_ids: Sequence[int]) -> None:
        """Tokens of the answer, in order."""
        self.num_outputs += len(token_ids)
        self._note(token_ids, 1.0)

    @property
    def forbidden(self) -> Ids:
        """Ids that cannot be drawn now: bad words, the last token of those that have come that far, ends held back."""
        never = self._never_yet if self.num_outputs < self.spec.min_tokens else self._bad_ids
        if not len(self._lasts):
            return never
        completing = (self._matches_any | (self._prefixes == self._tail)).all(axis=1)
        return np.concatenate([never, self._lasts[completing]])

    @property
    def seen(self) -> tuple[Ids, NDArray[np.float32]]:
        """[s] the different tokens of prompt and answer, [s] how often each is in the answer. `add` changes both."""
        return self._ids[: len(self._place)], self._counts[: len(self._place)]

    def _note(self, token_ids: Sequence[int], count: float) -> None:
        if not token_ids:
            return
        if width := len(self._tail):
            new = token_ids[-width:]
            self._tail[: width - len(new)] = self._tail[len(new) :].copy()
            self._tail[width - len(new) :] = new
        if not self.has_penalty:
            return
        places = [self._place.setdefault(token, len(self._place)) for token in token_ids]
        if len(self._place) > len(self._ids):
            room = max(2 * len(self._ids), len(self._place))
            self._ids = np.concatenate([self._ids, np.empty(room - len(self._ids), np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room - len(self._counts), np.float32)])
        self._ids[places] = token_ids
        if count:
            np.add.at(self._counts, places, np.float32(count))


class TokenHistories:
    """Of all running requests that need one; on tp_rank 0 of the last stage alone. Changed only by `apply`."""

    def __init__(self) -> None:
        self._by_request: dict[str, TokenHistory] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def apply(self, plan: StepPlan, tokens_of: Callable[[str], Sequence[int]]) -> None:
        """Finished first, then new, then diffs. tokens_of: all tokens of a request that is new in this plan."""
        for request_id in plan.finished:
            self._by_request.pop(request_id, None)
        for new in plan.new:
            if needs_history(new.sampling):
                history = TokenHistory(new.sampling, tokens_of(new.request_id), new.num_output_tokens)
                self._by_request[new.request_id] = history
        if self._by_request:
            for diff in plan.diffs:
                if (known := self._by_request.get(diff.request_id)) is not None:
                    known.add(diff.new_token_ids)

    def of(self, request_ids: Sequence[str]) -> list[TokenHistory | None]:
        return [self._by_request.get(request_id) for request_id in request_ids]


def needs_history(spec: SamplingSpec) -> bool:
    """Whether its logits are edited at all, at some time."""
    return bool(spec.logit_bias or spec.bad_words or spec.held_back) or _has_penalty(spec)


def _has_penalty(spec: SamplingSpec) -> bool:
    return spec.repetition_penalty != 1.0 or spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0
