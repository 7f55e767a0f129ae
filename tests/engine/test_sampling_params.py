"""A request is refused before it owns anything, with the field's name; what is accepted arrives unchanged."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from dist_infer.grammar import Grammar
from dist_infer.messages import GrammarSpec
from dist_infer.sampling_params import SamplingParams
from partition.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "8"),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", 1e-30),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", None),
        ("top_k", -2),
        ("top_k", 1.0),
        ("top_k", False),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("seed", 2**63),
        ("seed", 1.0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", b"a"),
        ("stop", 3),
        ("stop", ["a"] * 65),
        ("stop", "a" * 1025),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", range(2000)),
        ("ignore_eos", 1),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("typical_p", 0),
        ("typical_p", 1.5),
        ("typical_p", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", 0.001),
        ("repetition_penalty", 101),
        ("repetition_penalty", math.inf),
        ("presence_penalty", -2.1),
        ("presence_penalty", None),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", True),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", 5),
        ("logit_bias", [5]),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("bad_words", ""),
        ("bad_words", ["a", ""]),
        ("bad_words", [[5]]),
        ("bad_words", "a" * 257),
        ("bad_words", ["a"] * 257),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("min_tokens", 1.0),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("best_of", 0),
        ("best_of", 129),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
    ],
)
def test_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} must be "):
        SamplingParams(**{field: value})


def test_message_of_a_huge_value_stays_short() -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(max_tokens=-(10**3000))
    assert len(str(caught.value)) < 200


def test_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="max_token"):
        SamplingParams(max_token=3)  # type: ignore[call-arg]


def test_one_stop_string_is_not_its_letters() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()


def test_top_k_minus_one_is_off() -> None:
    assert SamplingParams(top_k=-1).top_k == 0


def test_frozen_equal_and_replaceable() -> None:
    params = SamplingParams(max_tokens=None, stop="x")
    assert params == SamplingParams(max_tokens=None, stop="x")
    assert dataclasses.replace(params, top_k=5).stop == ("x",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


def test_spec_carries_every_field_of_the_sampler() -> None:
    spec = SamplingParams(temperature=0.5, top_k=3, top_p=0.9, logprobs=2).spec(seed=-1)
    assert (spec.temperature, spec.top_k, spec.top_p, spec.num_logprobs) == (0.5, 3, 0.9, 2)
    assert spec.seed == 2**63 - 1


def test_fields_that_depend_on_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^best_of must be a whole number from n, which is 4, .* not 3"):
        SamplingParams(n=4, best_of=3)
    with pytest.raises(ConfigError, match=r"^min_tokens must be at most max_tokens, which is 4, not 5"):
        SamplingParams(max_tokens=4, min_tokens=5)
    assert SamplingParams(max_tokens=None, min_tokens=500).min_tokens == 500
    assert (SamplingParams(n=3).num_samples, SamplingParams(n=2, best_of=5).num_samples) == (3, 5)


def test_a_bias_is_a_mapping_or_its_items_and_can_be_hashed() -> None:
    params = SamplingParams(logit_bias={7: 1, 5: -2.5})
    assert params.logit_bias == ((5, -2.5), (7, 1.0))
    assert dataclasses.replace(params, n=2).logit_bias == params.logit_bias
    assert hash(params) == hash(SamplingParams(logit_bias=[(5, -2.5), (7, 1.0)]))


def test_spec_carries_every_option_of_the_logits() -> None:
    """A field that is checked and then left behind would be an option that does nothing."""
    options: dict[str, Any] = {
        "min_p": 0.1,
        "typical_p": 0.9,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": ((5, 1.0),),
        "min_tokens": 3,
    }
    grammar = Grammar.choice(["a"])
    params = SamplingParams(**options, prompt_logprobs=4, bad_words="x", grammar=grammar, stop_token_ids=[9])
    spec = params.spec(1, bad_words=[(8, 9)], eos_token_ids=[2])
    assert spec.grammar == GrammarSpec(grammar, (2, 9))
    assert {name: getattr(spec, name) for name in options} == options
    assert (spec.bad_words, spec.num_prompt_logprobs) == (((8, 9),), 4)
    assert set(dataclasses.asdict(spec)) == {
        *options,
        *("temperature", "top_k", "top_p", "seed", "num_logprobs", "bad_words", "held_back", "num_prompt_logprobs"),
        "grammar",
    }


def test_what_is_held_back_is_what_would_end_the_answer() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=[9])
    assert params.spec(1, eos_token_ids=[2, 9]).held_back == (2, 9)
    assert dataclasses.replace(params, ignore_eos=True).spec(1, eos_token_ids=[2]).held_back == (9,)
    assert dataclasses.replace(params, min_tokens=0).spec(1, eos_token_ids=[2]).held_back == ()


def test_answers_differ_in_their_seed_and_one_scores_the_prompt() -> None:
    params = SamplingParams(n=3, prompt_logprobs=0)
    specs = [params.spec(-1, index=index) for index in range(3)]
    assert len({spec.seed for spec in specs}) == 3
    assert specs[0].seed == 2**63 - 1
    assert [spec.num_prompt_logprobs for spec in specs] == [0, None, None]


def test_ranking_needs_logprobs_even_if_nobody_is_shown_any() -> None:
    assert SamplingParams(best_of=2).spec(1).num_logprobs == 0
    assert SamplingParams(best_of=2, logprobs=3).spec(1).num_logprobs == 3
    assert SamplingParams(n=2, best_of=2).spec(1).num_logprobs is None
