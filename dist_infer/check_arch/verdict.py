"""From sampled positions and the reference to a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Verdict: TypeAlias = Literal["equal", "refused", "wrong", "failed", "no-reference"]
"""refused: not run, with the reason. failed: something else than a refusal was raised. no-reference: transformers
itself cannot build or run the tiny model, so there is nothing to compare with."""

TOLERANCE = 1e-5  # of the largest log-probability, in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """One token that a run of ours sampled: what it had seen, what it took, and log-probabilities [vocab]."""

    prefix: tuple[int, ...]
    token_id: int
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`error`: largest difference over largest reference value. `num_agreeing`: tokens that are the reference's
    likeliest, or as likely as that within the tolerance."""

    error: float
    num_agreeing: int
    num_positions: int

    @property
    def verdict(self) -> Literal["equal", "wrong"]:
        good = self.error <= TOLERANCE and self.num_agreeing == self.num_positions  # NaN is not
        return "equal" if good else "wrong"


def compare(positions: Sequence[Position], reference: Callable[[tuple[int, ...]], torch.Tensor]) -> Comparison:
    """Each position against the reference's log-probabilities after the same prefix (teacher forcing)."""
    if not positions:
        raise ValueError("no positions to compare")
    largest_error, largest_value, agreeing = 0.0, 0.0, 0
    rows = []
    for position in positions:
        wanted = reference(position.prefix)
        found = torch.tensor(position.logprobs, dtype=torch.float64)
        if found.shape != wanted.shape:
            return Comparison(error=math.inf, num_agreeing=0, num_positions=len(positions))
        rows.append((position.token_id, wanted))
        same = found == wanted  # minus infinity on both sides: a token the model forbids
        error = float((found - wanted).abs().masked_fill(same, 0.0).max())
        largest_error = error if math.isnan(error) else max(largest_error, error)
        largest_value = max(largest_value, float(wanted[wanted.isfinite()].abs().max()))
        if math.isnan(largest_error):
            return Comparison(error=math.nan, num_agreeing=0, num_positions=len(positions))
    for token_id, wanted in rows:
        agreeing += bool(wanted.max() - wanted[token_id] <= TOLERANCE * largest_value)
    return Comparison(
        error=largest_error / max(largest_value, 1e-30), num_agreeing=agreeing, num_positions=len(positions)
    )
