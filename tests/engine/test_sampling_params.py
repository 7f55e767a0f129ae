"""A request is refused before it owns anything, with the field's name; what is accepted arrives unchanged."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

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
