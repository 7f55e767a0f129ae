"""Which tokens stay in the draw: top_k, top_p, min_p, typical_p, in this order, as transformers has it.

They work on logits in descending order. A batch in which nobody asks for a filter does not compute it, and a row that
does not ask for it comes out unchanged to the bit: what a request draws must not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dist_infer.messages import SamplingSpec


def filtered_probabilities(
    ordered: torch.Tensor,  # [B, vocab] float32, descending: logits over temperature
    specs: Sequence[SamplingSpec],
) -> torch.Tensor:
    """[B, vocab] float64 in the same order: 0 for what is filtered, the rest in proportion, not summing to 1."""
    if any(spec.top_k for spec in specs):
        most = _column([spec.top_k or ordered.shape[1] for spec in specs], ordered.device)
        ranks = torch.arange(ordered.shape[1], device=ordered.device)[None]
        ordered = ordered.masked_fill(ranks >= most, -math.inf)
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    device = probabilities.device
    del ordered  # what top_k has made of it
    if any(spec.top_p < 1 for spec in specs):
        # The first token past p is kept: the smallest set whose sum reaches p.
        sums = _column([spec.top_p if spec.top_p < 1 else math.inf for spec in specs], device)
        before = probabilities.cumsum(dim=-1).sub_(probabilities)
        probabilities.masked_fill_(before >= sums, 0.0)
        del before
    if any(spec.min_p for spec in specs):
        least = _column([spec.min_p for spec in specs], device) * probabilities[:, :1]
        probabilities.masked_fill_(probabilities < least, 0.0)
    if any(spec.typical_p < 1 for spec in specs):
        mass = _column([spec.typical_p if spec.typical_p < 1 else math.inf for spec in specs], device)
        probabilities.masked_fill_(_is_untypical(probabilities, mass), 0.0)
    return probabilities


def _is_untypical(probabilities: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """[B, vocab]: beyond the smallest set of tokens, by distance of surprise from entropy, that has the mass [B, 1]."""
    total = probabilities.sum(dim=-1, keepdim=True)
    distance = (probabilities / total).log_().neg_()  # infinite for what is filtered already
    entropy = (probabilities * distance).nansum(dim=-1, keepdim=True) / total
    distance.sub_(entropy).abs_()
    nearest, order = distance.sort(dim=-1, stable=True)
    sums = probabilities.gather(1, order).cumsum_(dim=-1)
    del order
    last = (sums < mass * total).sum(dim=-1, keepdim=True).clamp_(max=sums.shape[1] - 1)
    farthest = nearest.gather(1, last).masked_fill(mass == math.inf, math.inf)
    return distance > farthest


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]
