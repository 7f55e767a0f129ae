"""What crosses processes arrives as it was sent, whatever numbers are in it."""

from __future__ import annotations

import json
import math

import pytest

from dist_infer.messages import PromptLogprobs, SampledToken, StepPlan, StepResult, StreamReport, decode, encode


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.1, -1e-300])
def test_any_float_arrives_as_it_is(value: float) -> None:
    """Infinities and NaN became null, which no float can be: one request's logits ended the engine for all."""
    sent = StepResult(
        1,
        (SampledToken("a", 5, value, ((5, value), (6, -0.5))),),
        (PromptLogprobs("a", 1, (value,), (((7, value),),)),),
    )
    assert repr(decode(StepResult, encode(sent))) == repr(sent)  # NaN equals nothing


def test_nested_mappings_too() -> None:
    sent = StreamReport(0, 1, 2, 3, math.inf, 0.0, 0.0, 0.0, 4, {"head": math.inf})
    assert decode(StreamReport, encode(sent)) == sent


def test_the_wire_is_json_and_another_message_is_refused() -> None:
    data = encode(StepPlan(3, ()))
    assert json.loads(data)[0]["step_id"] == 3
    with pytest.raises(ValueError, match="validation error"):
        decode(StepResult, data)
