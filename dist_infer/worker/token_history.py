"""What the last stage keeps of a request whose logits are edited before a token is drawn: how often it has which token.

Kept by token that occurs, not by token of the vocabulary: at most 24 bytes for each token of a context, where counts
over the vocabulary would take megabytes for each request, which no plan has set aside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_infer.messages import SamplingSpec, StepPlan

ANY_TOKEN = -1  # in a prefix shorter than its neighbours: matches whatever is there
_NO_TOKEN = -2  # before the first token: matches nothing
_ROOM = 64


class TokenHistory:
    """One request's edits as tensors, made once, and its tokens, kept current by `add`. Tensors are on the host.

    bias_ids, bias [b]; bad_ids [w1]: bad words of one token; prefixes [w, L], lasts [w]: longer ones, all but their
    last token and that; held_back [e]: what cannot come yet.
    """

    def __init__(self, spec: SamplingSpec, token_ids: Sequence[int], num_output_tokens: int) -> None:
        self.spec = spec
        self.num_outputs = 0
        self.has_penalty = _has_penalty(spec)
        self.bias_ids = torch.tensor([token for token, _ in spec.logit_bias], dtype=torch.long)
        self.bias = torch.tensor([bias for _, bias in spec.logit_bias], dtype=torch.float)
        self.bad_ids = torch.tensor([word[0] for word in spec.bad_words if len(word) == 1], dtype=torch.long)
        longer = [word for word in spec.bad_words if len(word) > 1]
        width = max((len(word) - 1 for word in longer), default=0)
        self.prefixes = torch.tensor(
            [(ANY_TOKEN,) * (width - len(word) + 1) + word[:-1] for word in longer], dtype=torch.long
        ).reshape(len(longer), width)
        self.lasts = torch.tensor([word[-1] for word in longer], dtype=torch.long)
        self._held_back = torch.tensor(spec.held_back, dtype=torch.long)
        self._tail = [_NO_TOKEN] * width
        self._place: dict[int, int] = {}  # of a token in the two below
        self._ids = torch.empty(_ROOM, dtype=torch.long)
        self._counts = torch.zeros(_ROOM)  # in the answer; of tokens that only the prompt has: 0
        num_prompt_tokens = len(token_ids) - num_output_tokens
        self._note(token_ids[:num_prompt_tokens], 0.0)
        self.add(token_ids[num_prompt_tokens:])

    def add(self, token_ids: Sequence[int]) -> None:
        """Tokens of the answer, in order."""
        self.num_outputs += len(token_ids)
        self._note(token_ids, 1.0)

    @property
    def held_back(self) -> torch.Tensor:
        """Ids that cannot be drawn now."""
        return self._held_back if self.num_outputs < self.spec.min_tokens else self._held_back[:0]

    @property
    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[s] the different tokens of prompt and answer, [s] how often each is in the answer."""
        return self._ids[: len(self._place)], self._counts[: len(self._place)]

    def tail(self, width: int) -> list[int]:
        """The last `width` tokens; `width` is not less than that of `prefixes`, what is not needed matches nothing."""
        return [_NO_TOKEN] * (width - len(self._tail)) + self._tail

    def _note(self, token_ids: Sequence[int], count: float) -> None:
        if self._tail:
            self._tail = [*self._tail, *token_ids[-len(self._tail) :]][-len(self._tail) :]
        if not self.has_penalty or not token_ids:
            return
        places = [self._place.setdefault(token, len(self._place)) for token in token_ids]
        if len(self._place) > len(self._ids):
            room = max(2 * len(self._ids), len(self._place))
            self._ids = torch.cat([self._ids, self._ids.new_empty(room - len(self._ids))])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(room - len(self._counts))])
        index = torch.tensor(places)
        self._ids[index] = torch.tensor(token_ids)
        if count:
            self._counts.index_add_(0, index, torch.full((len(places),), count))


class TokenHistories:
    """Of all running requests that need one; on tp_rank 0 of the last stage alone. Changed only by `apply`."""

    def __init__(self) -> None:
        self._by_request: dict[str, TokenHistory] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def apply(self, plan: StepPlan) -> None:
        """Finished first, then new, then diffs."""
        for request_id in plan.finished:
            self._by_request.pop(request_id, None)
        for new in plan.new:
            if needs_history(new.sampling):
                history = TokenHistory(new.sampling, new.token_ids, new.num_output_tokens)
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
