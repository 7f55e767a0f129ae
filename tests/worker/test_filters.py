"""The filters keep exactly what transformers' warpers keep, whatever stands in the other rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from dist_infer.messages import SamplingSpec
from dist_infer.worker.filters import Filters, filtered_probabilities, filters_of, limits

VOCAB = 300


def filters(specs: list[SamplingSpec]) -> Filters:
    return filters_of(specs, torch.tensor([limits(options) for options in specs], dtype=torch.float64).T)


def ours(logits: torch.Tensor, specs: list[SamplingSpec]) -> torch.Tensor:
    """[B, vocab] by token id, summing to 1."""
    temperature = torch.tensor([[spec.temperature] for spec in specs])
    ordered, ids = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    kept = filtered_probabilities(ordered, filters(specs))
    found = torch.zeros_like(kept).scatter(1, ids, kept)
    return found / found.sum(-1, keepdim=True)


def theirs(logits: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
    """The chain of `generate`, in its order."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(float(spec.temperature))])
    if spec.top_k:
        chain.append(TopKLogitsWarper(spec.top_k))
    if spec.top_p < 1:
        chain.append(TopPLogitsWarper(spec.top_p))
    if spec.min_p:
        chain.append(MinPLogitsWarper(spec.min_p))
    if spec.typical_p < 1:
        chain.append(TypicalLogitsWarper(spec.typical_p))
    return chain(torch.zeros(len(logits), 1, dtype=torch.long), logits).double().softmax(-1)


def spec(**values: Any) -> SamplingSpec:
    return SamplingSpec(**{"temperature": 1.0, **values})


ALONE = [
    spec(top_k=1),
    spec(top_k=7),
    spec(top_k=VOCAB + 5),
    spec(top_p=0.01),
    spec(top_p=0.5),
    spec(top_p=0.97),
    spec(min_p=0.02),
    spec(min_p=0.4),
    spec(min_p=1.0),
    spec(typical_p=0.05),
    spec(typical_p=0.5),
    spec(typical_p=0.95),
    spec(temperature=0.3, top_p=0.8),
    spec(temperature=3.0, typical_p=0.3),
]
TOGETHER = [
    spec(top_k=50, top_p=0.9),
    spec(top_k=50, min_p=0.1),
    spec(top_k=40, typical_p=0.6),
    spec(top_p=0.8, min_p=0.05, typical_p=0.7),
    spec(temperature=1.7, top_k=100, top_p=0.95, min_p=0.01, typical_p=0.9),
]


@pytest.mark.parametrize("options", ALONE + TOGETHER, ids=lambda options: str(options).split("num_")[0])
def test_kept_tokens_and_their_weights_are_transformers(options: SamplingSpec) -> None:
    """Guards each definition, its edge (the token that crosses p stays) and the order of the chain."""
    torch.manual_seed(0)
    logits = torch.randn(40, VOCAB) * 3
    found, expected = ours(logits, [options] * 40), theirs(logits, options)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_a_row_comes_out_the_same_to_the_bit_beside_any_other() -> None:
    """A filter that a neighbour asks for must not touch a row that does not: rounding would change its draws."""
    torch.manual_seed(1)
    logits = torch.randn(len(ALONE) + 1, VOCAB) * 4
    specs = [spec(), *ALONE]
    temperature = torch.tensor([[options.temperature] for options in specs])
    ordered = (logits / temperature).sort(dim=-1, descending=True, stable=True)[0]
    together = filtered_probabilities(ordered, filters(specs))
    for row, options in enumerate(specs):
        assert torch.equal(filtered_probabilities(ordered[row : row + 1], filters([options]))[0], together[row])


@pytest.mark.parametrize("options", [spec(typical_p=0.5), spec(top_p=0.5), spec(min_p=0.5), spec(top_k=2)], ids=str)
def test_impossible_tokens_stay_impossible(options: SamplingSpec) -> None:
    """-inf is what a bad word leaves: entropy and sums over it must not become NaN."""
    logits = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf, 0.0]])
    found = ours(logits, [options])[0]
    assert not found.isnan().any()
    assert found[1] == found[3] == 0
    assert found.sum() == pytest.approx(1)
