"""A matcher belongs to one thread at a time: to the one that makes a mask until that is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from dist_infer.grammar import Grammar
from dist_infer.grammar_matcher import Matcher
from dist_infer.messages import GrammarSpec, NewRequest, SampledToken, SamplingSpec, StepPlan
from dist_infer.vocabulary import Vocabulary
from dist_infer.worker import grammar_masks
from dist_infer.worker.grammar_masks import GrammarMasks

BYTES = Vocabulary(texts=tuple(chr(value) for value in range(256)), special_ids=())


class Prompt(ThreadPoolExecutor):
    """Work has begun when `submit` returns, as it may on a busy machine."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        begun = threading.Event()

        def running() -> Any:
            begun.set()
            return work(*arguments, **options)

        found = super().submit(running)
        assert begun.wait(10)
        return found


def test_nothing_is_asked_of_a_matcher_that_makes_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards all requests: the library raises "already borrowed" in such a case, which ended the engine."""
    leave, busy = threading.Event(), set[int]()
    inner = Matcher.mask

    def mask(matcher: Matcher) -> bytes:
        busy.add(id(matcher))
        assert leave.wait(10)
        busy.discard(id(matcher))
        return inner(matcher)

    def asked(name: str) -> property:
        found = getattr(Matcher, name)

        def get(matcher: Matcher) -> bool:
            if id(matcher) in busy:
                raise RuntimeError("already mutably borrowed")
            return bool(found.fget(matcher))

        return property(get)

    monkeypatch.setattr(grammar_masks, "_new_pool", lambda: Prompt(4))
    masks = GrammarMasks()
    spec = SamplingSpec(temperature=0, grammar=GrammarSpec(Grammar.regex("ab*c"), ()))
    new = NewRequest(request_id="r", token_ids=(1,), block_ids=(0,), sampling=spec)
    masks.apply(StepPlan(step_id=0, micro_batches=(), new=(new,), vocabulary=BYTES))
    assert any(masks.of(["r"])[0] or b"")
    monkeypatch.setattr(Matcher, "mask", mask)
    for name in ("may_end", "must_end"):
        monkeypatch.setattr(Matcher, name, asked(name))
    (token,) = masks.take_in([SampledToken("r", ord("a"))])
    assert not token.completes
    leave.set()
    assert any(masks.of(["r"])[0] or b"")
    assert [masks.take_in([SampledToken("r", ord("c"))])[0].completes] == [True]
    masks.close()
