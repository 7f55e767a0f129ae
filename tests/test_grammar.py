"""Grammars of the wrong shape or size are refused where they are made; the process that tries them out can be lost."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from dist_infer import SamplingParams
from dist_infer.errors import ClusterError, ConfigError
from dist_infer.grammar import MAX_GRAMMAR_BYTES, Grammar
from dist_infer.grammar_checker import GrammarChecker, GrammarLimits
from dist_infer.messages import NewRequest, StepPlan, decode, encode
from dist_infer.vocabulary import Vocabulary

BYTES = Vocabulary(texts=tuple(chr(value) for value in range(256)), special_ids=())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar(kind="yaml"), "kind must be one of"),
        (lambda: Grammar(kind="regex", text=7), "text must be a string"),
        (lambda: Grammar.regex(""), "needs a text"),
        (lambda: Grammar.regex("a" * (MAX_GRAMMAR_BYTES + 1)), "more than the 65536"),
        (lambda: Grammar.regex("ab\\"), "escapes nothing"),
        (lambda: Grammar.regex("\ud800"), "surrogate"),
        (lambda: Grammar(kind="json_object", text="{}"), "takes no text"),
        (lambda: Grammar(kind="regex", text="a", choices=("b",)), "takes no choices"),
        (lambda: Grammar.choice([]), "1 to 1024"),
        (lambda: Grammar.choice(["a"] * 1025), "1 to 1024"),
        (lambda: Grammar.choice(["a", ""]), "not empty"),
        (lambda: Grammar(kind="choice", choices="ab"), "list of texts"),
        (lambda: Grammar.json_schema("[1]"), "is an object"),
        (lambda: Grammar.json_schema("{"), "no JSON"),
        (lambda: Grammar.json_schema('{"minimum": NaN}'), "NaN"),
        (lambda: Grammar.json_schema({"minimum": float("inf")}), "no JSON"),
        (lambda: Grammar.json_schema({"a": {1, 2}}), "no JSON"),
        (lambda: Grammar.json_schema('{"items":' * 65 + "{}" + "}" * 65), "deeper than 64"),
        (lambda: Grammar.json_schema('{"items":' * 6000 + "{}" + "}" * 6000), "no JSON|deeper"),
        (lambda: Grammar.json_schema('{"const": "\\ud800"}'), "surrogate"),
        (lambda: SamplingParams(grammar="a+"), "grammar must be a Grammar"),
    ],
)
def test_wrong_shapes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_schemas_are_equal_whatever_their_blanks() -> None:
    """So that one is compiled once."""
    assert Grammar.json_schema('{ "type":\n"null" }') == Grammar.json_schema({"type": "null"})
    assert Grammar.json_schema('{"a":1,"b":2}') != Grammar.json_schema('{"b":2,"a":1}')  # the order is the answer's


@pytest.mark.parametrize("grammar", [Grammar.choice(["é", '"\n']), Grammar.json_schema({"const": "\u2028\x7f"})])
def test_grammar_and_vocabulary_cross_the_wire(grammar: Grammar) -> None:
    sampling = SamplingParams(grammar=grammar, stop_token_ids=[7], min_tokens=1).spec(1, eos_token_ids=[2])
    plan = StepPlan(0, (), new=(NewRequest("r", (1,), (0,), sampling),), vocabulary=BYTES)
    found = decode(StepPlan, encode(plan))
    assert found == plan
    assert found.new[0].sampling.grammar is not None
    assert found.new[0].sampling.grammar.end_ids == (2, 7)


def test_the_checking_process_may_be_lost_and_the_checker_closed() -> None:
    checker = GrammarChecker(lambda: BYTES)
    good = Grammar.regex("a+")
    checker.check(good)
    child = checker._child
    assert child is not None
    child.kill()
    child._process.wait()
    checker.check(Grammar.regex("b+"))
    assert checker._child is not child
    checker.close()
    checker.close()
    checker.check(good)  # remembered
    with pytest.raises(ClusterError, match="closed"):
        checker.check(Grammar.regex("c+"))


def test_a_grammar_beyond_the_memory_limit_is_refused_and_the_next_is_not() -> None:
    checker = GrammarChecker(lambda: BYTES, GrammarLimits(max_memory_bytes=1 << 20, timeout_s=20.0))
    try:
        rules = "\n".join(f'r{i}: "x{i}" | r{(i * 7) % 1800} r{i}' for i in range(1, 1500))
        with pytest.raises(ConfigError, match="memory"):
            checker.check(
                Grammar.lark("start: r1\n" + rules + "\n" + "\n".join(f'r{i}: "y"' for i in range(1500, 1800)))
            )
        checker.check(Grammar.regex("a"))
    finally:
        checker.close()


def test_what_was_found_is_told_without_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards those who know their grammar, good or bad, against waiting for somebody else's."""
    checker = GrammarChecker(lambda: BYTES)
    good, bad, new = Grammar.regex("a+"), Grammar.lark('start: "a" nothing'), Grammar.regex("b")
    try:
        checker.check(good)
        with pytest.raises(ConfigError, match="nothing"):
            checker.check(bad)
        assert [checker.knows(each) for each in (good, bad, new)] == [True, True, False]
        monkeypatch.setattr("dist_infer.grammar_checker._TURN_TIMEOUT_S", 0.01)
        with checker._turn:  # somebody else's, who takes long
            checker.check(good)
            with pytest.raises(ConfigError, match="nothing"):
                checker.check(bad)
            with pytest.raises(ClusterError, match="no turn"):
                checker.check(new)
    finally:
        checker.close()


def test_a_grammar_that_was_too_slow_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a good grammar on a machine that was busy once."""
    checker = GrammarChecker(lambda: BYTES, GrammarLimits(timeout_s=1e-9))
    grammar = Grammar.regex("a+")
    try:
        with pytest.raises(ConfigError, match="longer than"):
            checker.check(grammar)
        assert checker.knows(grammar)
        checker._limits = GrammarLimits(timeout_s=20.0)
        with pytest.raises(ConfigError, match="longer than"):
            checker.check(grammar)
        now_s = time.monotonic() + 60
        monkeypatch.setattr("dist_infer.grammar_checker.time.monotonic", lambda: now_s)
        assert not checker.knows(grammar)
        checker.check(grammar)
    finally:
        monkeypatch.undo()
        checker.close()
