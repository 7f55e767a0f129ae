"""One token per row of logits, vectorised over the batch; runs on tp_rank 0 of the last stage.

    raw logits ──> edits (logit_edits) ──> grammars (logit_masks) ──> greedy: the likeliest
        │                                                         └─> temperature ──> filters ──> draw
        └──> log-probabilities: of the unmodified distribution

A draw is the inverse of the cumulative distribution at one uniform number, a pure function of (seed, position): the
same seed gives the same text whatever else is in the batch and however the model is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_infer.counter_random import uniform
from dist_infer.messages import SampledToken, SamplingSpec
from dist_infer.worker.filters import filtered_probabilities
from dist_infer.worker.logit_edits import edit
from dist_infer.worker.logit_masks import keep_allowed
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
    is_plain = all(spec.temperature == 0 and spec.num_logprobs is None for spec in specs)
    if is_plain and not any(histories) and not any(masks):
        return [
            SampledToken(request, token)
            for request, token in zip(request_ids, logits.float().argmax(dim=-1).tolist(), strict=True)
        ]
    tokens: list[SampledToken] = []
    step = rows_at_once(logits.shape[-1])
    for start in range(0, len(specs), step):
        part = slice(start, start + step)
        raw = logits[part].float()
        chosen = _choose(raw, specs[part], positions[part], histories[part], masks[part])
        tokens += _with_logprobs(raw, chosen, request_ids[part], specs[part])
    return tokens


def likeliest(logprobs: torch.Tensor, counts: Sequence[int | None]) -> list[tuple[tuple[int, float], ...]]:
    """For each row of logprobs [B, vocab] its `count` likeliest ids with their values, likeliest first."""
    most = max(count or 0 for count in counts)
    if not most:
        return [()] * len(counts)
    values, indices = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    rows = zip(indices.tolist(), values.tolist(), counts, strict=True)
    return [tuple(zip(ids[: count or 0], found[: count or 0], strict=True)) for ids, found, count in rows]


def _choose(
    raw: torch.Tensor,
    specs: Sequence[SamplingSpec],
    positions: Sequence[int],
    histories: Sequence[TokenHistory | None],
    masks: Sequence[bytes | None],
) -> torch.Tensor:
    """[B] ids. `raw` stays as it is."""
    logits = raw
    if any(history is not None for history in histories) or any(masks):
        logits = raw.clone()
        edit(logits, histories)
        keep_allowed(logits, raw, masks)
    drawing = [row for row, spec in enumerate(specs) if spec.temperature > 0]
    if len(drawing) == len(specs):
        return _draw(logits, specs, positions)
    chosen = logits.argmax(dim=-1)
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        chosen[rows] = _draw(logits[rows], [specs[row] for row in drawing], [positions[row] for row in drawing])
    return chosen


def _draw(logits: torch.Tensor, specs: Sequence[SamplingSpec], positions: Sequence[int]) -> torch.Tensor:
    """[B] drawn ids; every temperature is above 0."""
    temperature = torch.tensor([spec.temperature for spec in specs], device=logits.device)
    # Stable, so that ties fall the same way on every machine and in every batch.
    ordered, ids = (logits / temperature[:, None]).sort(dim=-1, descending=True, stable=True)
    cumulative = filtered_probabilities(ordered, specs).cumsum_(dim=-1)
    points = torch.tensor(
        [uniform(spec.seed, position) for spec, position in zip(specs, positions, strict=True)],
        dtype=torch.float64,
        device=logits.device,
    )
    total = cumulative[:, -1:].contiguous()
    # `right`: the first whose cumulative sum is above the point, so that a token of probability 0 is never drawn.
    index = torch.searchsorted(cumulative, points[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the first that reaches the sum: all behind it have probability 0
    index = torch.minimum(index, last).clamp_(max=ids.shape[1] - 1)
    return ids.gather(1, index)[:, 0]


def _with_logprobs(
    raw: torch.Tensor, chosen: torch.Tensor, request_ids: Sequence[str], specs: Sequence[SamplingSpec]
) -> list[SampledToken]:
    tokens = chosen.tolist()
    counts = [spec.num_logprobs for spec in specs]
    if all(count is None for count in counts):
        return [SampledToken(request, token) for request, token in zip(request_ids, tokens, strict=True)]
    logprobs = raw.log_softmax(dim=-1)
    own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    return [
        SampledToken(request, token) if count is None else SampledToken(request, token, logprob, top)
        for request, token, count, logprob, top in zip(
            request_ids, tokens, counts, own, likeliest(logprobs, counts), strict=True
        )
    ]
