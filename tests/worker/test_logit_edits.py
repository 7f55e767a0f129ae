"""Edits equal transformers' processors, follow a request's tokens as they come, and leave other rows alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from dist_infer.messages import NewRequest, RequestDiff, SamplingSpec, StepPlan
from dist_infer.worker.logit_edits import Edits
from dist_infer.worker.sampler import sample
from dist_infer.worker.token_history import TokenHistories, TokenHistory, needs_history

VOCAB = 60
PROMPT = [5, 6, 5, 7, 8]
OUTPUT = [9, 5, 9, 9]


def edited(logits: torch.Tensor, *histories: TokenHistory | None) -> torch.Tensor:
    found = logits.clone()
    Edits(histories, found.device).apply(found)
    return found


def history(prompt: list[int] = PROMPT, output: list[int] = OUTPUT, **options: Any) -> TokenHistory:
    return TokenHistory(SamplingSpec(**options), prompt + output, len(output))


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1, VOCAB) * 4


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty(logits: torch.Tensor, penalty: float) -> None:
    """Over prompt and answer; once for a token, however often it came; both signs."""
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), logits)
    assert torch.equal(edited(logits, history(repetition_penalty=penalty)), expected)
    assert {bool(logits[0, token] < 0) for token in PROMPT + OUTPUT} == {True, False}


def test_presence_and_frequency_count_the_answer_alone(logits: torch.Tensor) -> None:
    counts = torch.bincount(torch.tensor(OUTPUT), minlength=VOCAB)
    expected = logits - 0.7 * counts - 1.5 * (counts > 0)
    found = edited(logits, history(frequency_penalty=0.7, presence_penalty=1.5))
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[0, [6, 7, 8]], logits[0, [6, 7, 8]])  # of the prompt alone
    rewarded = edited(logits, history(frequency_penalty=-2.0))
    assert rewarded[0, 9] == logits[0, 9] + 6


def test_repetition_comes_before_the_others(logits: torch.Tensor) -> None:
    found = edited(logits, history(repetition_penalty=2.0, presence_penalty=1.0))
    value = logits[0, 9]
    assert found[0, 9] == (value / 2 if value > 0 else value * 2) - 1


def test_logit_bias(logits: torch.Tensor) -> None:
    biases = {3: 2.5, 9: -100.0, 59: 0.25}
    expected = SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases.items()})(
        torch.tensor([PROMPT]), logits
    )
    assert torch.equal(edited(logits, history(logit_bias=tuple(biases.items()))), expected)


def test_bad_words_of_all_lengths(logits: torch.Tensor) -> None:
    """Against transformers over many random contexts; a prefix may span prompt and answer, or be longer than both."""
    chance = random.Random(0)
    hits = 0
    for _ in range(600):
        tokens = [chance.randrange(4) for _ in range(chance.randint(1, 6))]
        words = [[chance.randrange(4) for _ in range(chance.randint(1, 8))] for _ in range(chance.randint(1, 5))]
        cut = chance.randint(0, len(tokens) - 1)
        expected = NoBadWordsLogitsProcessor(words)(torch.tensor([tokens]), logits)
        words_tuple = tuple(dict.fromkeys(map(tuple, words)))
        found = edited(logits, history(tokens[: len(tokens) - cut], tokens[len(tokens) - cut :], bad_words=words_tuple))
        assert torch.equal(found, expected), (tokens, words)
        hits += int((found == -torch.inf).sum() > len({word[0] for word in words if len(word) == 1}))
    assert hits > 30  # words of several tokens were met


@pytest.mark.parametrize("num_outputs", [0, 1, 2, 3])
def test_min_tokens_holds_the_ends_back(logits: torch.Tensor, num_outputs: int) -> None:
    tokens = torch.tensor([PROMPT + OUTPUT[:num_outputs]])
    expected = MinNewTokensLengthLogitsProcessor(len(PROMPT), 2, [2, 11])(tokens, logits)
    found = edited(logits, history(output=OUTPUT[:num_outputs], min_tokens=2, held_back=(2, 11)))
    assert torch.equal(found, expected)
    assert bool(found[0, 2] == -torch.inf) == (num_outputs < 2)


def test_a_history_that_grows_equals_one_made_at_once(logits: torch.Tensor) -> None:
    """Guards the incremental counts, their growth past the first allocation and the tail of the bad words."""
    chance = random.Random(1)
    options: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "bad_words": ((1, 2, 3), (4, 4), (5,)),
        "min_tokens": 150,
        "held_back": (2,),
    }
    wide = torch.randn(1, 500)
    prompt, output = [chance.randrange(500) for _ in range(30)], [chance.randrange(500) for _ in range(200)]
    output[-3:] = [0, 1, 2]
    grown = history(prompt, [], **options)
    for start in range(0, len(output), 7):
        grown.add(output[start : start + 7])
    assert torch.equal(edited(wide, grown), edited(wide, history(prompt, output, **options)))
    assert edited(wide, grown)[0, 3] == -torch.inf


def test_a_batch_is_its_rows() -> None:
    """Pairs of (row, token) that went to another row would edit a stranger's logits."""
    torch.manual_seed(2)
    logits = torch.randn(7, VOCAB)
    histories = [
        history(repetition_penalty=1.5),
        None,
        history(bad_words=((8, 9), (5, 9, 9, 4), (3,))),
        history(output=[1], frequency_penalty=1.0, logit_bias=((1, 3.0),)),
        history(output=[], min_tokens=1, held_back=(2,)),
        None,
        history(PROMPT, [8], repetition_penalty=0.7, bad_words=((8, 8),), logit_bias=((0, -5.0), (7, 1.0))),
    ]
    together = edited(logits, *histories)
    sliced, edits = logits.clone(), Edits(histories, logits.device)
    for start in range(0, 7, 2):  # as the sampler does it: some rows at a time
        assert edits.touches(start, start + 1) == (histories[start] is not None)
        edits.apply(sliced[start : start + 2], start)
    assert torch.equal(sliced, together)
    for row, one in enumerate(histories):
        alone = edited(logits[row : row + 1], one)[0]
        assert torch.equal(together[row], alone)
        assert torch.equal(alone, logits[row]) == (one is None)


def test_histories_follow_the_plans() -> None:
    """After a preemption the answer so far comes as part of the request: it must count as answer, not as prompt."""
    spec, plain = SamplingSpec(frequency_penalty=1.0), SamplingSpec(temperature=1.0, top_k=3)
    histories = TokenHistories()
    known = {"a": (5, 6), "plain": (5,)}
    new = tuple(NewRequest(name, known[name], (0,), of) for name, of in (("a", spec), ("plain", plain)))
    histories.apply(StepPlan(0, (), new=new), known.__getitem__)
    assert len(histories) == 1
    assert [found is not None for found in histories.of(["a", "plain"])] == [True, False]
    diffs = (RequestDiff("a", (6,), ()), RequestDiff("plain", (6,), ()))
    histories.apply(StepPlan(1, (), diffs=diffs), known.__getitem__)
    (before,) = histories.of(["a"])
    again = NewRequest("a", (5, 6, 6), (3,), spec, num_output_tokens=1)
    histories.apply(StepPlan(2, (), finished=("a", "plain"), new=(again,)), {"a": (5, 6, 6)}.__getitem__)
    (after,) = histories.of(["a"])
    assert before is not None
    assert after is not None
    assert after is not before
    zeros = torch.zeros(1, VOCAB)
    assert torch.equal(edited(zeros, after), edited(zeros, before))
    assert edited(zeros, after)[0, 5:7].tolist() == [0.0, -1.0]
    histories.apply(StepPlan(3, (), finished=("a",)), known.__getitem__)
    assert len(histories) == 0


def test_only_what_edits_logits_costs_a_history() -> None:
    assert not needs_history(SamplingSpec(temperature=0.7, top_p=0.9, min_p=0.1, typical_p=0.5, num_logprobs=3))
    assert needs_history(SamplingSpec(presence_penalty=-0.1))
    assert needs_history(SamplingSpec(held_back=(2,), min_tokens=1))


def test_edits_reach_greedy_and_drawn_tokens_but_no_logprob() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 2.0]] * 2)
    specs = [SamplingSpec(num_logprobs=1, bad_words=((1,),)), SamplingSpec(temperature=1e-3, bad_words=((1,),))]
    kept = logits.clone()
    histories = [TokenHistory(spec, [0], 0) for spec in specs]
    greedy, drawn = sample(logits, ["a", "b"], specs, [1, 1], histories)
    assert (greedy.token_id, drawn.token_id) == (3, 3)
    assert torch.equal(logits, kept)
    assert greedy.logprob == pytest.approx(float(logits[0].log_softmax(-1)[3]))
    assert greedy.top_logprobs[0][0] == 1  # the likeliest of the unmodified distribution
