"""Drawing a token: filters, determinism and the distribution itself, on logits made by hand."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import TypicalLogitsWarper

from dist_infer.counter_random import sample_seed, uniform
from dist_infer.messages import SampledToken, SamplingSpec, StepResult, decode, encode
from dist_infer.worker import sampler
from dist_infer.worker.sampler import sample
from dist_infer.worker.token_history import TokenHistory

CHI_SQUARE_999 = {2: 13.82, 3: 16.27, 4: 18.47, 7: 24.32}  # exceeded by chance once in a thousand


def draw(logits: list[float], spec: SamplingSpec, position: int = 0) -> SampledToken:
    return sample(torch.tensor([logits]), ["r"], [spec], [position])[0]


def draws(logits: list[float], spec: SamplingSpec, num: int) -> list[int]:
    """One token of each of `num` positions, in one batch."""
    rows = torch.tensor(logits).expand(num, -1)
    return [token.token_id for token in sample(rows, ["r"] * num, [spec] * num, range(num))]


# ---- greedy


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert draw([0.0, 3.0, 1.0], SamplingSpec()).token_id == 1
    assert draw([2.0, 5.0, 5.0, 5.0], SamplingSpec()).token_id == 1


def test_greedy_ignores_seed_filters_and_position() -> None:
    for seed in range(5):
        assert draw([0.0, 3.0, 1.0], SamplingSpec(seed=seed, top_k=3, top_p=0.9), seed).token_id == 1


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    assert set(draws([80.0, 79.9, -80.0], SamplingSpec(temperature=1e-5), 200)) == {0}


# ---- filters


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_the_k_likeliest(top_k: int) -> None:
    logits = [0.1, 0.4, 0.3, 0.2]
    likeliest = {1, 2, 3} if top_k == 3 else {1, 2} if top_k == 2 else {1}
    assert set(draws(logits, SamplingSpec(temperature=1.0, top_k=top_k), 400)) == likeliest


def test_top_k_cuts_ties_in_the_order_of_ids() -> None:
    """An unstable sort would draw another token on another machine."""
    assert set(draws([1.0] * 50, SamplingSpec(temperature=1.0, top_k=3), 400)) == {0, 1, 2}


def test_top_k_beyond_the_vocabulary_is_off() -> None:
    off = draws([0.1, 0.2, 0.3], SamplingSpec(temperature=1.0, seed=4), 50)
    assert draws([0.1, 0.2, 0.3], SamplingSpec(temperature=1.0, seed=4, top_k=1000), 50) == off


def test_top_p_keeps_the_likeliest_even_when_it_alone_is_more_than_p() -> None:
    logits = [math.log(0.9), math.log(0.06), math.log(0.04)]
    assert set(draws(logits, SamplingSpec(temperature=1.0, top_p=0.01), 300)) == {0}


def test_top_p_keeps_the_token_that_crosses_p_and_nothing_after_it() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draws(logits, SamplingSpec(temperature=1.0, top_p=0.7), 600)) == {0, 1}
    assert set(draws(logits, SamplingSpec(temperature=1.0, top_p=0.9), 600)) == {0, 1, 2}
    assert set(draws(logits, SamplingSpec(temperature=1.0, top_p=1.0), 600)) == {0, 1, 2, 3}


def test_top_p_counts_after_temperature_and_top_k() -> None:
    """0.4, 0.3 renormalised after top_k=2 are 0.57, 0.43: p = 0.5 is reached by the first alone."""
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(draws(logits, SamplingSpec(temperature=1.0, top_k=2, top_p=0.5), 400)) == {0}
    # at temperature 0.25 the first has 0.4^4 / sum = 0.72 of all
    assert set(draws(logits, SamplingSpec(temperature=0.25, top_p=0.7), 400)) == {0}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = [-math.inf, 0.0, -math.inf, 0.0]
    assert set(draws(logits, SamplingSpec(temperature=5.0), 400)) == {1, 3}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12),
    st.floats(0.05, 5),
    st.integers(0, 12),
    st.floats(0.01, 1.0),
    st.integers(0, 2**63 - 1),
)
def test_no_filtered_token_is_ever_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """Against a sum over a plain list; a token within rounding of the edge of p may fall on either side."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or len(logits)]
    weights = [math.exp((logits[token] - logits[order[0]]) / temperature) for token in order]
    allowed, reached = {order[0]}, 0.0
    for token, weight in zip(order, weights, strict=True):
        if reached < top_p + 1e-5:
            allowed.add(token)
        reached += weight / sum(weights)
    spec = SamplingSpec(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert set(draws(logits, spec, 40)) <= allowed


# ---- the distribution


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax(temperature: float) -> None:
    """Chi-square of 4000 draws; deterministic, since a draw is a function of seed and position."""
    logits = [2.0, 1.0, 0.0, 1.5, -1.0]
    num = 4000
    found = torch.bincount(
        torch.tensor(draws(logits, SamplingSpec(temperature=temperature, seed=11), num)), minlength=5
    )
    expected = (torch.tensor(logits) / temperature).softmax(-1) * num
    assert float(((found - expected) ** 2 / expected).sum()) < CHI_SQUARE_999[4]


def test_the_first_draws_of_many_seeds_follow_softmax() -> None:
    """Seeds 0, 1, 2 … are what people choose: their first numbers must not be alike."""
    num = 4000
    specs = [SamplingSpec(temperature=1.0, seed=seed) for seed in range(num)]
    rows = torch.zeros(num, 8)
    found = torch.bincount(torch.tensor([t.token_id for t in sample(rows, ["r"] * num, specs, [7] * num)]), minlength=8)
    assert float(((found - num / 8) ** 2 / (num / 8)).sum()) < CHI_SQUARE_999[7]


def test_filtered_draws_follow_the_renormalised_rest() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    num = 4000
    found = torch.bincount(torch.tensor(draws(logits, SamplingSpec(temperature=1.0, top_k=3, seed=5), num)))
    expected = torch.tensor([0.4, 0.3, 0.2]) / 0.9 * num
    assert len(found) == 3
    assert float(((found - expected) ** 2 / expected).sum()) < CHI_SQUARE_999[2]


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_uniform_is_a_number_below_one(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


# ---- determinism


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 100)
    specs = [SamplingSpec(temperature=1.0, top_p=0.95, seed=seed) for seed in (1, 2, 3, 1, 5, 6)]
    positions = [10, 10, 10, 11, 10, 10]
    names = [f"r{i}" for i in range(6)]
    together = [token.token_id for token in sample(logits, names, specs, positions)]
    alone = [sample(logits[i : i + 1], [names[i]], [specs[i]], [positions[i]])[0].token_id for i in reversed(range(6))]
    assert alone[::-1] == together
    mixed = [SamplingSpec(), *specs[1:5], SamplingSpec(temperature=100.0, top_k=1)]
    beside = [token.token_id for token in sample(logits, names, mixed, positions)]
    assert beside[1:5] == together[1:5]  # greedy and hot neighbours change nothing


def test_seeds_and_positions_differ() -> None:
    flat = [0.0] * 1000
    assert len({draw(flat, SamplingSpec(temperature=1.0, seed=seed)).token_id for seed in range(50)}) > 40
    assert len(set(draws(flat, SamplingSpec(temperature=1.0, seed=3), 50))) > 40


def test_low_precision_logits_are_drawn_like_their_float_values() -> None:
    torch.manual_seed(1)
    logits = torch.randn(20, 64, dtype=torch.bfloat16)
    arguments = (["r"] * 20, [SamplingSpec(temperature=0.8, top_k=20, seed=9)] * 20, range(20))
    assert sample(logits, *arguments) == sample(logits.float(), *arguments)


# ---- log-probabilities


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = torch.tensor([[0.5, 2.0, 1.0, -1.0]])
    expected = logits.log_softmax(-1)[0]
    spec = SamplingSpec(temperature=0.3, top_k=1, num_logprobs=3)
    token = sample(logits, ["r"], [spec], [0])[0]
    assert token.token_id == 1
    assert token.logprob == pytest.approx(float(expected[1]))
    assert [i for i, _ in token.top_logprobs] == [1, 2, 0]
    assert [value for _, value in token.top_logprobs] == pytest.approx([float(expected[i]) for i in (1, 2, 0)])


def test_what_comes_of_a_step_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are worked on one or two at a time where the vocabulary is large: the device waited after each of them."""
    torch.manual_seed(3)
    monkeypatch.setattr(sampler, "SAMPLING_BYTES", 40 * sampler.SAMPLING_BYTES_PER_LOGIT)
    assert sampler.rows_at_once(40) == 1
    fetch, num_fetched = torch.Tensor.tolist, 0

    def counted(self: torch.Tensor) -> Any:
        nonlocal num_fetched
        num_fetched += 1
        return fetch(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    for spec in (SamplingSpec(), SamplingSpec(temperature=1.0, num_logprobs=3), SamplingSpec(repetition_penalty=1.5)):
        num_fetched = 0
        histories = [TokenHistory(spec, [1, 2], 1) if spec.repetition_penalty != 1 else None for _ in range(9)]
        assert len(sample(torch.randn(9, 40), ["r"] * 9, [spec] * 9, range(9), histories)) == 9
        assert num_fetched == 1


def test_equals_come_in_the_same_order_whatever_neighbours_ask_for() -> None:
    """Logits in bfloat16 are often equal: which of them are the 2 likeliest must not depend on who wants 20."""
    logits = torch.zeros(2, 3000)
    specs = [SamplingSpec(num_logprobs=2), SamplingSpec(num_logprobs=20)]
    together = sample(logits, ["a", "b"], specs, [0, 0])
    assert together[0] == sample(logits[:1], ["a"], specs[:1], [0])[0]
    assert [len(token.top_logprobs) for token in together] == [2, 20]


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_that_is_no_numbers_fails_its_request_alone(bad: float | str, temperature: float) -> None:
    """It drew token 0 or any other, without a word; with log-probabilities the engine ended for all."""
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    sound = logits.clone()
    if isinstance(bad, str):
        logits[1] = -math.inf
    else:
        logits[1, 7] = bad
    for num_logprobs in (None, 2):
        specs = [SamplingSpec(temperature=temperature, seed=4, num_logprobs=num_logprobs, top_p=0.9)] * 3
        first, second, third = sample(logits, ["a", "b", "c"], specs, [3, 3, 3])
        expected = sample(sound, ["a", "b", "c"], specs, [3, 3, 3])
        assert (first, third) == (expected[0], expected[2])
        assert second.is_fault
        assert "are not finite numbers" in str(second.error)
        assert (second.logprob, second.top_logprobs) == (None, ())


def test_a_logit_of_minus_infinity_is_no_fault() -> None:
    token = sample(torch.tensor([[0.0, -math.inf]]), ["a"], [SamplingSpec(num_logprobs=2)], [0])[0]
    assert (token.error, token.token_id, token.top_logprobs[1]) == (None, 0, (1, -math.inf))
    assert decode(StepResult, encode(StepResult(0, (token,)))).tokens == (token,)


def test_each_request_gets_the_logprobs_it_asked_for() -> None:
    logits = torch.zeros(3, 5)
    specs = [SamplingSpec(), SamplingSpec(num_logprobs=0), SamplingSpec(num_logprobs=2)]
    none, own, two = sample(logits, ["a", "b", "c"], specs, [0, 0, 0])
    assert (none.logprob, none.top_logprobs) == (None, ())
    assert own.logprob == pytest.approx(-math.log(5))
    assert own.top_logprobs == ()
    assert len(two.top_logprobs) == 2
    assert [token.request_id for token in (none, own, two)] == ["a", "b", "c"]


# ---- the newer options, end to end


def test_typical_draws_follow_the_renormalised_rest() -> None:
    """What typical_p keeps need not be the likeliest: the draw goes over gaps of probability 0."""
    logits = [math.log(p) for p in (0.5, 0.15, 0.15, 0.1, 0.05, 0.05)]
    kept = TypicalLogitsWarper(0.25)(torch.zeros(1, 1), torch.tensor([logits]))[0].softmax(-1)
    assert kept[0] == 0  # the likeliest is too likely to be typical
    num = 4000
    found = torch.bincount(torch.tensor(draws(logits, SamplingSpec(temperature=1.0, typical_p=0.25, seed=2), num)))
    found = torch.nn.functional.pad(found, (0, 6 - len(found)))
    used = kept > 0
    assert not found[~used].any()
    chi_square = float(((found - kept * num) ** 2 / (kept * num))[used].sum())
    assert chi_square < {2: 10.83, 3: 13.82, 4: 16.27}[int(used.sum())]


def test_min_p_draws_follow_the_renormalised_rest() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.06, 0.04)]
    num = 4000
    found = torch.bincount(torch.tensor(draws(logits, SamplingSpec(temperature=1.0, min_p=0.4, seed=3), num)))
    expected = torch.tensor([0.4, 0.3, 0.2]) / 0.9 * num
    assert len(found) == 3
    assert float(((found - expected) ** 2 / expected).sum()) < CHI_SQUARE_999[2]


def test_slices_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are worked on some at a time, to stay within the plan's memory: specs and histories must go along."""
    torch.manual_seed(3)
    logits = torch.randn(9, 40)
    specs = [
        SamplingSpec(temperature=i % 3, seed=i, num_logprobs=i % 4 or None, presence_penalty=i % 2, top_k=5 * (i % 2))
        for i in range(9)
    ]
    histories = [TokenHistory(spec, [1, 2, i, i], 2) if i % 2 else None for i, spec in enumerate(specs)]
    names = [f"r{i}" for i in range(9)]
    whole = sample(logits, names, specs, range(9), histories)
    monkeypatch.setattr(sampler, "SAMPLING_BYTES", 2 * 40 * sampler.SAMPLING_BYTES_PER_LOGIT)
    assert sampler.rows_at_once(40) == 2
    cut = sample(logits, names, specs, range(9), histories)
    assert [(t.request_id, t.token_id, [i for i, _ in t.top_logprobs]) for t in cut] == [
        (t.request_id, t.token_id, [i for i, _ in t.top_logprobs]) for t in whole
    ]


def test_a_row_where_all_is_forbidden_still_gives_an_id() -> None:
    """A vocabulary of bad words has no answer; the engine must live on."""
    for temperature in (0.0, 1.0):
        spec = SamplingSpec(temperature=temperature, bad_words=((0,), (1,), (2,)), typical_p=0.5, top_p=0.5)
        (token,) = sample(torch.zeros(1, 3), ["r"], [spec], [1], [TokenHistory(spec, [0], 0)])
        assert token.token_id in (0, 1, 2)


# ---- seeds of several answers


def test_the_first_answer_has_the_seed_itself_and_the_others_their_own() -> None:
    assert [sample_seed(seed, 0) for seed in (0, 7, -1)] == [0, 7, 2**63 - 1]
    seeds = [sample_seed(seed, index) for seed in range(200) for index in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_draws_of_one_requests_answers_are_independent() -> None:
    """Answer 1 of seed s must not be answer 0 of a seed nearby: pairs of draws fill the square evenly."""
    num = 4000
    cells = [
        4 * int(4 * uniform(sample_seed(seed, 0), position)) + int(4 * uniform(sample_seed(seed, 1), position))
        for seed in range(40)
        for position in range(num // 40)
    ]
    found = torch.bincount(torch.tensor(cells), minlength=16)
    assert float(((found - num / 16) ** 2 / (num / 16)).sum()) < 37.70  # 15 degrees, once in a thousand


def test_copies_on_the_way_stay_within_the_bytes_that_the_plan_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every option on: what this allocates and has not yet let go, at its highest, for each logit of a slice."""
    live = highest = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal live, highest
            inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            found = function(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, tuple) else (found,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                    num_bytes = tensor.untyped_storage().nbytes()
                    live += num_bytes
                    weakref.finalize(tensor.untyped_storage(), release, num_bytes)
            highest = max(highest, live)
            return found

    def release(num_bytes: int) -> None:
        nonlocal live
        live -= num_bytes

    vocab, rows = 20000, 8
    options = {"top_k": 9000, "top_p": 0.99, "min_p": 1e-6, "typical_p": 0.9, "repetition_penalty": 1.1}
    spec = SamplingSpec(temperature=1.0, num_logprobs=5, **options)
    histories = [TokenHistory(spec, list(range(50)), 20) for _ in range(rows)]
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab).bfloat16()
    monkeypatch.setattr(sampler, "SAMPLING_BYTES", rows * vocab * sampler.SAMPLING_BYTES_PER_LOGIT)
    with Counting():
        sample(logits, ["r"] * rows, [spec] * rows, range(rows), histories)
    per_logit = highest / (rows * vocab)
    assert 40 < per_logit <= sampler.SAMPLING_BYTES_PER_LOGIT - 16, per_logit  # a GPU's sort takes 16 more
