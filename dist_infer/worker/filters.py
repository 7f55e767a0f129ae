"""Which tokens stay in the draw: top_k, top_p, min_p, typical_p, in this order, as transformers has it.

They work on logits in descending order. A batch in which nobody asks for a filter does not compute it, and a row that
does not ask for it comes out unchanged to the bit: what a request draws must not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_infer.messages import SamplingSpec

NUM_LIMITS = 4


def limits(spec: SamplingSpec) -> tuple[float, float, float, float]:
    """What `Filters` has of a row; infinite, or 0 for min_p, where it does not ask."""
    return (
        float(spec.top_k or math.inf),
        spec.top_p if spec.top_p < 1 else math.inf,
        spec.min_p,
        spec.typical_p if spec.typical_p < 1 else math.inf,
    )


def needs_ranks(spec: SamplingSpec, vocab: int) -> bool:
    """Whether a filter of it asks for the tokens in their order of likelihood; min_p does not."""
    return 0 < spec.top_k < vocab or spec.top_p < 1 or spec.typical_p < 1


@dataclass(frozen=True)
class Filters:
    """Columns [B, 1] float64 of the rows' `limits`; None where no row asks."""

    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    typical_p: torch.Tensor | None


def filters_of(specs: Sequence[SamplingSpec], columns: torch.Tensor) -> Filters:
    """columns: [NUM_LIMITS, B], the limits of these specs on the device of the logits."""
    top_k, top_p, min_p, typical_p = columns[:, :, None]
    return Filters(
        top_k if any(spec.top_k for spec in specs) else None,
        top_p if any(spec.top_p < 1 for spec in specs) else None,
        min_p if any(spec.min_p for spec in specs) else None,
        typical_p if any(spec.typical_p < 1 for spec in specs) else None,
    )


def filtered_probabilities(
    ordered: torch.Tensor,  # [B, vocab] float32, descending: logits over temperature
    filters: Filters,
) -> torch.Tensor:
    """[B, vocab] float64 in the same order: 0 for what is filtered, the rest in proportion, not summing to 1."""
    if filters.top_k is not None:
        ranks = torch.arange(ordered.shape[1], device=ordered.device)[None]
        ordered = ordered.masked_fill(ranks >= filters.top_k, -math.inf)
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    del ordered  # what top_k has made of it
    if filters.top_p is not None:
        # The first token past p is kept: the smallest set whose sum reaches p.
        before = probabilities.cumsum(dim=-1).sub_(probabilities)
        probabilities.masked_fill_(before >= filters.top_p, 0.0)
        del before
    if filters.min_p is not None:
        drop_below(probabilities, filters.min_p * probabilities[:, :1])
    if filters.typical_p is not None:
        probabilities.masked_fill_(_is_untypical(probabilities, filters.typical_p), 0.0)
    return probabilities


def drop_below(probabilities: torch.Tensor, least: torch.Tensor) -> None:
    """In place: 0 for what is less likely than `least` [B, 1]."""
    probabilities.masked_fill_(probabilities < least, 0.0)


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
