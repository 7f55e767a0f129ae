"""One token per row of logits, vectorised over the batch; runs on tp_rank 0 of the last stage.

    raw logits ──> edits (logit_edits) ──> grammars (logit_masks) ──> greedy: the likeliest
        │                                                         └─> temperature ──> filters ──> draw
        └──> log-probabilities: of the unmodified distribution

A draw is the inverse of the cumulative distribution at one uniform number, a pure function of (seed, position): the
same seed gives the same text whatever else is in the batch and however the model is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dist_infer.counter_random import uniform
from dist_infer.messages import NOT_FINITE, SampledToken, SamplingSpec
from dist_infer.sampling_params import MAX_LOGPROBS
from dist_infer.worker.filters import drop_below, filtered_probabilities, filters_of, limits, needs_ranks
from dist_infer.worker.logit_edits import Edits
from dist_infer.worker.logit_masks import keep_allowed
from dist_infer.worker.to_device import to_device
from dist_infer.worker.token_history import TokenHistory
from partition.plan_data import SAMPLING_BYTES, SAMPLING_BYTES_PER_LOGIT


def rows_at_once(vocab: int) -> int:
    """Rows of logits whose copies, made on the way to a token, stay within SAMPLING_BYTES."""
    return max(1, SAMPLING_BYTES // (SAMPLING_BYTES_PER_LOGIT * vocab))


def sample(
    logits: torch.Tensor,  # [B, vocab]
    request_ids: Sequence[str],
    specs: Sequence[SamplingSpec],
    positions: Sequence[int],
    histories: Sequence[TokenHistory | None] = (),
    masks: Sequence[bytes | None] = (),
) -> list[SampledToken]:
    """One SampledToken per row. positions: number of tokens the request has so far, the counter of its draws.

    histories, masks: of the requests that have one, for each row or none at all; a mask has a bit for each token.
    """
    histories = histories or [None] * len(specs)
    masks = masks or [None] * len(specs)
    with_logprobs = any(spec.num_logprobs is not None for spec in specs)
    if all(spec.temperature == 0 for spec in specs) and not (with_logprobs or any(histories) or any(masks)):
        raw = logits.float()
        chosen = raw.argmax(dim=-1)
        found = torch.stack([chosen.double(), raw.gather(1, chosen[:, None])[:, 0].double()], dim=1)
        return _sampled(found, request_ids, specs)
    edits = Edits(histories, logits.device) if any(histories) else None
    columns = _draw_columns(specs, positions, logits.device)
    num_top = max(spec.num_logprobs or 0 for spec in specs)
    parts: list[torch.Tensor] = []
    step = rows_at_once(logits.shape[-1])
    for start in range(0, len(specs), step):
        part = slice(start, start + step)
        raw = logits[part].float()
        edited = raw
        if edits is not None and edits.touches(start, start + len(raw)):
            edited = raw.clone()
            edits.apply(edited, start)
        chosen = _choose(edited, raw, specs[part], columns[:, part], masks[part])
        results = [chosen.double()[:, None], raw.amax(dim=-1, keepdim=True).double()]
        if with_logprobs:
            results.append(logprob_columns(raw, chosen, num_top))
        parts.append(torch.cat(results, dim=1))
    return _sampled(torch.cat(parts), request_ids, specs)


def logprob_columns(raw: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> torch.Tensor:
    """[B, 1] float64 log-probabilities of the tokens [B] in raw [B, vocab]; num_top > 0: [B, 1 + 2k], see `likeliest`.

    At least the k = MAX_LOGPROBS likeliest: which of two equals comes first may depend on k, and must not on a row's
    neighbours (who asks for more than users may is alone with it). float64 holds ids and values alike, so that all goes
    to the host in one copy.
    """
    logprobs = raw.log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[:, None]).double()
    if not num_top:
        return own
    values, ids = logprobs.topk(min(max(MAX_LOGPROBS, num_top), logprobs.shape[-1]), dim=-1)
    return torch.cat([own, ids.double(), values.double()], dim=1)


def likeliest(columns: Sequence[float], count: int | None) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest ids of a row with their values, likeliest first. columns: k ids, then their k values."""
    num_found = len(columns) // 2
    return tuple((int(columns[at]), columns[num_found + at]) for at in range(min(count or 0, num_found)))


def _sampled(found: torch.Tensor, request_ids: Sequence[str], specs: Sequence[SamplingSpec]) -> list[SampledToken]:
    """found [B, 2 or more]: chosen id, highest logit, `logprob_columns`. The one time that the host waits for it all.

    The highest logit tells whether a row is numbers at all: it is NaN or infinite otherwise.
    """
    tokens: list[SampledToken] = []
    for request_id, spec, (token_id, highest, *logprobs) in zip(request_ids, specs, found.tolist(), strict=True):
        if not math.isfinite(highest):
            tokens.append(SampledToken(request_id, 0, error=NOT_FINITE.format("its next token"), is_fault=True))
        elif spec.num_logprobs is None:
            tokens.append(SampledToken(request_id, int(token_id)))
        else:
            top = likeliest(logprobs[1:], spec.num_logprobs)
            tokens.append(SampledToken(request_id, int(token_id), logprobs[0], top))
    return tokens


def _draw_columns(specs: Sequence[SamplingSpec], positions: Sequence[int], device: torch.device) -> torch.Tensor:
    """[2 + NUM_LIMITS, B] float64: temperature, the uniform number, the limits of the filters."""
    rows = [
        (spec.temperature, uniform(spec.seed, position), *limits(spec))
        for spec, position in zip(specs, positions, strict=True)
    ]
    return to_device(np.array(rows, np.float64).T.copy(), device)


def _choose(
    logits: torch.Tensor,
    raw: torch.Tensor,
    specs: Sequence[SamplingSpec],
    columns: torch.Tensor,
    masks: Sequence[bytes | None],
) -> torch.Tensor:
    """[B] ids. `raw` stays as it is; `logits` may be the same. columns: see `_draw_columns`."""
    if any(masks):
        logits = raw.clone() if logits is raw else logits
        keep_allowed(logits, raw, masks)
    drawing = [row for row, spec in enumerate(specs) if spec.temperature > 0]
    if len(drawing) == len(specs):
        return _draw(logits, specs, columns)
    chosen = logits.argmax(dim=-1)
    if drawing:
        rows = to_device(np.array(drawing, np.int64), logits.device)
        chosen[rows] = _draw(logits[rows], [specs[row] for row in drawing], columns[:, rows])
    return chosen


def _draw(logits: torch.Tensor, specs: Sequence[SamplingSpec], columns: torch.Tensor) -> torch.Tensor:
    """[B] drawn ids; every temperature is above 0. Which way a row is drawn is its own spec's affair alone."""
    ranked = [row for row, spec in enumerate(specs) if needs_ranks(spec, logits.shape[-1])]
    if len(ranked) == len(specs):
        return _draw_ranked(logits, specs, columns)
    chosen = _draw_by_id(logits, specs, columns)
    if ranked:
        rows = to_device(np.array(ranked, np.int64), logits.device)
        chosen[rows] = _draw_ranked(logits[rows], [specs[row] for row in ranked], columns[:, rows])
    return chosen


def _draw_by_id(logits: torch.Tensor, specs: Sequence[SamplingSpec], columns: torch.Tensor) -> torch.Tensor:
    """Without a sort of the vocabulary, which takes ten times as long as the rest."""
    probabilities = (logits / columns[0].float()[:, None]).softmax(dim=-1, dtype=torch.float64)
    if (min_p := filters_of(specs, columns[2:]).min_p) is not None:
        drop_below(probabilities, min_p * probabilities.amax(dim=-1, keepdim=True))
    return _at_points(probabilities, columns[1])


def _draw_ranked(logits: torch.Tensor, specs: Sequence[SamplingSpec], columns: torch.Tensor) -> torch.Tensor:
    # Stable, so that ties fall the same way on every machine and in every batch.
    ordered, ids = (logits / columns[0].float()[:, None]).sort(dim=-1, descending=True, stable=True)
    index = _at_points(filtered_probabilities(ordered, filters_of(specs, columns[2:])), columns[1])
    return ids.gather(1, index[:, None])[:, 0]


def _at_points(probabilities: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """[B] columns at which the cumulative sum passes `points` [B] of it. Overwrites the probabilities."""
    cumulative = probabilities.cumsum_(dim=-1)
    total = cumulative[:, -1:].contiguous()
    # `right`: the first whose cumulative sum is above the point, so that a token of probability 0 is never drawn.
    index = torch.searchsorted(cumulative, points[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the first that reaches the sum: all behind it have probability 0
    return torch.minimum(index, last).clamp_(max=cumulative.shape[1] - 1)[:, 0]
