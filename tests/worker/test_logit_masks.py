"""Masks forbid what they do not allow, in their own rows alone."""

from __future__ import annotations

import pytest
import torch

from dist_infer.messages import SamplingSpec
from dist_infer.worker.logit_masks import keep_allowed
from dist_infer.worker.sampler import sample

VOCAB = 19  # no whole number of bytes


def bits(*allowed: int) -> bytes:
    return sum(1 << token for token in allowed).to_bytes(8, "little")


def test_only_what_is_allowed_keeps_its_logits() -> None:
    raw = torch.arange(3.0 * VOCAB).reshape(3, VOCAB)
    logits = raw.clone()
    keep_allowed(logits, raw, [None, bits(0, 9, 18, 19, 63), None])  # 19 and 63 are no tokens of the model
    assert torch.equal(logits[[0, 2]], raw[[0, 2]])
    assert logits[1].isfinite().nonzero().flatten().tolist() == [0, 9, 18]
    assert torch.equal(logits[1, [0, 9, 18]], raw[1, [0, 9, 18]])


def test_where_edits_left_nothing_the_grammar_wins() -> None:
    raw = torch.arange(2.0 * VOCAB).reshape(2, VOCAB)
    logits = raw.clone()
    logits[:, 4:6] = float("-inf")
    keep_allowed(logits, raw, [bits(4, 5), bits(3, 4)])
    assert logits.isfinite().nonzero().tolist() == [[0, 4], [0, 5], [1, 3]]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_draws_stay_within_the_mask_and_logprobs_without(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, VOCAB) * 4
    spec = SamplingSpec(temperature=temperature, num_logprobs=0, top_k=3)
    masks = [bits(2, 11) if row % 2 else None for row in range(64)]
    tokens = sample(logits, ["r"] * 64, [spec] * 64, range(64), masks=masks)
    plain = sample(logits, ["r"] * 64, [spec] * 64, range(64))
    for row, token in enumerate(tokens):
        assert token.token_id in (2, 11) if row % 2 else token == plain[row]
        assert token.logprob == pytest.approx(logits[row].log_softmax(-1)[token.token_id].item(), abs=1e-5)


def test_a_mask_that_is_too_short_is_no_mask() -> None:
    raw = torch.zeros(1, VOCAB)
    with pytest.raises(RuntimeError, match="2 bytes for 19 tokens"):
        keep_allowed(raw.clone(), raw, [b"\xff\xff"])
