"""Edits of logits that depend on a request's own tokens, for a whole batch at once.

Order, as transformers has it: logit_bias, repetition penalty, presence and frequency penalty, bad words, min_tokens.
They come before the filters and hold for greedy requests, too. What is edited is listed as (row, token) pairs, so that
the work grows with what is edited and not with the vocabulary; the lists of a step go to the device in two copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dist_infer.worker.to_device import to_device
from dist_infer.worker.token_history import Ids, TokenHistory

_NEVER = float("-inf")
_NO_IDS, _NO_NUMBERS = np.empty(0, np.int64), np.empty(0, np.float32)


class Edits:
    """Of all rows of a step, on the device; `apply` is for some of the rows at a time. None: that row stays."""

    def __init__(self, histories: Sequence[TokenHistory | None], device: torch.device) -> None:
        bias_ids, seen_ids, never_ids = [], [], []
        bias, counts = [], []
        penalties = np.ones((3, len(histories)), np.float32)  # of each row: repetition, presence, frequency
        for row, history in enumerate(histories):
            ids, times = history.seen if history is not None and history.has_penalty else (_NO_IDS, _NO_NUMBERS)
            bias_ids.append(_NO_IDS if history is None else history.bias_ids)
            bias.append(_NO_NUMBERS if history is None else history.bias)
            never_ids.append(_NO_IDS if history is None else history.forbidden)
            seen_ids.append(ids)
            counts.append(times)
            if history is not None:
                spec = history.spec
                penalties[:, row] = spec.repetition_penalty, spec.presence_penalty, spec.frequency_penalty
        groups = [_pairs(ids) for ids in (bias_ids, seen_ids, never_ids)]
        self._ends = [np.cumsum([0, *map(len, ids)]).tolist() for ids in (bias_ids, seen_ids, never_ids)]
        sizes = [group.shape[1] for group in groups]
        pairs = to_device(np.concatenate(groups, axis=1), device)
        self._biased, self._seen, self._never = torch.split(pairs, sizes, dim=1)
        numbers = to_device(np.concatenate([*bias, *counts, penalties.reshape(-1)]), device)
        self._bias, self._counts, factors = torch.split(numbers, [sizes[0], sizes[1], penalties.size])
        self._penalties = factors.view(3, len(histories))

    def touches(self, start: int, end: int) -> bool:
        """Whether any of these rows is edited."""
        return any(ends[start] < ends[end] for ends in self._ends)

    def apply(self, logits: torch.Tensor, start: int = 0) -> None:
        """Changes logits [B, vocab] (float32), the rows from `start` on, in place."""
        biased, seen, never = (slice(ends[start], ends[start + len(logits)]) for ends in self._ends)
        if biased.start < biased.stop:
            rows, ids = self._biased[:, biased]
            logits[rows - start, ids] += self._bias[biased]
        if seen.start < seen.stop:
            rows, ids = self._seen[:, seen]
            repetition, presence, frequency = self._penalties[:, rows]
            counts = self._counts[seen]
            values = logits[rows - start, ids]
            values = torch.where(values < 0, values * repetition, values / repetition)
            logits[rows - start, ids] = values - frequency * counts - presence * (counts > 0)
        if never.start < never.stop:
            rows, ids = self._never[:, never]
            logits[rows - start, ids] = _NEVER


def _pairs(ids: Sequence[NDArray[np.int64]]) -> Ids:
    """[2, sum of the lengths]: rows and token ids."""
    rows = np.repeat(np.arange(len(ids)), [len(tokens) for tokens in ids])
    return np.stack([rows, np.concatenate(ids)])
