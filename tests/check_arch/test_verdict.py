"""The verdict: what is seen as equal, and what as wrong."""

from __future__ import annotations

import math

import pytest
import torch

from dist_infer.check_arch.verdict import Position, compare

REFERENCE = torch.log_softmax(torch.linspace(-3, 4, 11, dtype=torch.float64), dim=-1)
BEST = 10


def position(values: torch.Tensor, token_id: int = BEST) -> Position:
    return Position(prefix=(1, 2), token_id=token_id, logprobs=tuple(values.tolist()))


def compared(*positions: Position, reference: torch.Tensor = REFERENCE) -> tuple[str, float, int]:
    found = compare(positions, lambda prefix: reference)
    return found.verdict, found.error, found.num_agreeing


def test_rounding_is_equal() -> None:
    """Guards against a tolerance of nothing: sums in another order differ in the last bits."""
    verdict, error, agreeing = compared(position(REFERENCE + 1e-6), position(REFERENCE))
    assert (verdict, agreeing) == ("equal", 2)
    assert error == pytest.approx(1e-6 / float(REFERENCE.abs().max()))


@pytest.mark.parametrize("factor", [1.001, 0.999, -1.0])
def test_a_scale_is_wrong(factor: float) -> None:
    """Guards the tolerance: a thousandth more in one place is an error, though no token changes."""
    assert compared(position(REFERENCE), position(REFERENCE * factor))[0] == "wrong"


def test_another_token_is_wrong_although_the_numbers_are_right() -> None:
    """Guards greedy agreement: what is sampled is a finding of its own."""
    assert compared(position(REFERENCE, token_id=BEST - 1)) == ("wrong", 0.0, 0)


def test_a_tie_may_fall_either_way() -> None:
    """Guards against a verdict by the last bit, where two tokens are as likely."""
    tied = REFERENCE.clone()
    tied[BEST - 1] = tied[BEST] - 1e-7
    assert compared(position(tied, token_id=BEST - 1), reference=tied) == ("equal", 0.0, 1)


def test_not_a_number_is_wrong() -> None:
    """Guards comparisons that NaN slips through."""
    verdict, error, _ = compared(position(REFERENCE.index_fill(0, torch.tensor([3]), math.nan)), position(REFERENCE))
    assert verdict == "wrong"
    assert math.isnan(error)


def test_forbidden_tokens_are_equal_on_both_sides_only() -> None:
    """Guards minus infinity: inf - inf is no number, and infinity for one side alone is no agreement."""
    masked = REFERENCE.index_fill(0, torch.tensor([0]), -math.inf)
    assert compared(position(masked), reference=masked)[0] == "equal"
    assert compared(position(masked))[0] == "wrong"


def test_another_vocabulary_is_wrong() -> None:
    """Guards a head that is cut or padded."""
    assert compared(position(REFERENCE[:-1], token_id=0))[0] == "wrong"
