"""One token per row of logits, vectorised over the batch; runs on tp_rank 0 of the last stage.

A draw is the inverse of the cumulative distribution at one uniform number, a pure function of (seed, position): the
same seed gives the same text whatever else is in the batch and however the model is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_infer.messages import SampledToken, SamplingSpec
from partition.plan_data import SAMPLING_BYTES, SAMPLING_BYTES_PER_LOGIT

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from splitmix64 (Steele et al., 2014) over the pair."""
    state = (seed * 0x9E3779B97F4A7C15 + position * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((state ^ (state >> 31)) >> 11) / float(1 << 53)


def sample(
    logits: torch.Tensor,  # [B, vocab]
    request_ids: Sequence[str],
    specs: Sequence[SamplingSpec],
    positions: Sequence[int],
) -> list[SampledToken]:
    """One SampledToken per row. positions: number of tokens the request has so far, the counter of its draws."""
    logits = logits.float()
    greedy = logits.argmax(dim=-1)
    chosen = greedy
    if any(spec.temperature > 0 for spec in specs):
        temperature = torch.tensor([spec.temperature for spec in specs], device=logits.device)
        drawn = _draw(logits, specs, positions, temperature)
        chosen = torch.where(temperature > 0, drawn, greedy)
    tokens = chosen.tolist()
    wanted = [spec.num_logprobs for spec in specs]
    if all(count is None for count in wanted):
        return [SampledToken(request, token) for request, token in zip(request_ids, tokens, strict=True)]
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    most = max(count or 0 for count in wanted)
    values, indices = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0], logprobs[:, :0].long())
    top_values, top_ids = values.tolist(), indices.tolist()
    return [
        SampledToken(request, token)
        if count is None
        else SampledToken(request, token, own[i], tuple(zip(top_ids[i][:count], top_values[i][:count], strict=True)))
        for i, (request, token, count) in enumerate(zip(request_ids, tokens, wanted, strict=True))
    ]


def _draw(
    logits: torch.Tensor, specs: Sequence[SamplingSpec], positions: Sequence[int], temperature: torch.Tensor
) -> torch.Tensor:
    """[B] drawn ids, some rows at a time so that the copies made on the way stay within SAMPLING_BYTES."""
    rows = max(1, SAMPLING_BYTES // (SAMPLING_BYTES_PER_LOGIT * logits.shape[-1]))
    parts = [
        _draw_rows(logits[i : i + rows], specs[i : i + rows], positions[i : i + rows], temperature[i : i + rows])
        for i in range(0, len(specs), rows)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _draw_rows(
    logits: torch.Tensor, specs: Sequence[SamplingSpec], positions: Sequence[int], temperature: torch.Tensor
) -> torch.Tensor:
    """Filters in the usual order: temperature, top_k, top_p."""
    vocab = logits.shape[-1]
    scaled = logits / temperature.clamp(min=1e-6)[:, None]
    # Stable, so that ties fall the same way on every machine and in every batch.
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([spec.top_k or vocab for spec in specs], device=logits.device)
    ranks = torch.arange(vocab, device=logits.device)[None]
    ordered = ordered.masked_fill(ranks >= top_k[:, None], float("-inf"))
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = torch.tensor([spec.top_p for spec in specs], dtype=torch.float64, device=logits.device)
    # The first token past p is kept: the smallest set whose sum reaches p. The likeliest always stays.
    probabilities = probabilities.masked_fill((before >= top_p[:, None]) & (ranks > 0), 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    point = torch.tensor(
        [uniform(spec.seed, position) for spec, position in zip(specs, positions, strict=True)],
        dtype=torch.float64,
        device=logits.device,
    )
    # `right`: the first whose cumulative sum is above the point, so that a token of probability 0 is never drawn.
    index = torch.searchsorted(cumulative, (point * cumulative[:, -1])[:, None], right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(index, last))[:, 0]
