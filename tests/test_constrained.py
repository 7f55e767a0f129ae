"""Constrained answers end to end on tiny models: every finished one fits, and nobody else notices."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from schemas import whole_schema
from tokenizer_kinds import make_tokenizer

from dist_infer import LLM, Grammar, SamplingParams
from dist_infer.errors import ConfigError
from dist_infer.outputs import CompletionOutput
from dist_infer.tokenizer import Tokenizer

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
EOS = 2
SLOW = Grammar.lark("start: X\nX: " + " & ".join(f"/(.{{{n}}})*/" for n in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)))
EXPLOSIVE = Grammar.regex(r"(\w{1,500}\s?){1,500}")  # the lexer's states multiply with each character
COLOURS = Grammar.choice(["red", "green", "greenish blue"])


def run_config(path: Path, store: Path, *, pipeline: int = 1, tensor: int = 1, **engine: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(path)},
        "parallel": {"pipeline": pipeline, "tensor": tensor},
        "offload": {"store": str(store)},
        "engine": {
            "kv_memory": "8 MiB",
            "block_tokens": 4,
            "max_batch_tokens": 64,
            "max_requests": 32,
            "max_model_len": 240,
            **engine,
        },
        "cluster": {"device": "cpu"},
    }


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model knows 20 ids more than its tokenizer, as many do."""
    directory = tmp_path_factory.mktemp("constrained") / "model"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=642, num_hidden_layers=2), directory)
    make_tokenizer("byte-level", directory)
    return directory


@pytest.fixture(scope="module")
def llm(path: Path, store_root: Path) -> Iterator[LLM]:
    with LLM(run_config(path, store_root)) as made:
        yield made
        made.integrity()


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def params(grammar: Grammar | None, seed: int = 1, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 40, "seed": seed, "grammar": grammar, **changes})


def answer(llm: LLM, sampling: SamplingParams) -> CompletionOutput:
    return llm.generate([PROMPT], sampling)[0].outputs[0]


# ---- what comes out


def test_finished_answers_to_200_random_schemas_validate(llm: LLM, tokenizer: Tokenizer) -> None:
    """In one batch, every fourth greedy; signs that end a value are made likelier, or a random model goes on."""
    schemas = [whole_schema(random.Random(seed)) for seed in range(200)]
    closing = {tokenizer.encode(sign, add_special_tokens=False)[0]: 4.0 for sign in '"]},:'}
    many = [
        params(
            Grammar.json_schema(schema),
            seed,
            max_tokens=150,
            logit_bias=closing,
            temperature=0 if seed % 4 == 0 else 1.0,
        )
        for seed, schema in enumerate(schemas)
    ]
    outputs = llm.generate([PROMPT] * 200, many)
    finished = [
        (schema, output.outputs[0].text)
        for schema, output in zip(schemas, outputs, strict=True)
        if output.outputs[0].finish_reason == "stop"
    ]
    assert len(finished) >= 150
    for schema, text in finished:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_each_kind_of_grammar_holds(llm: LLM, temperature: float) -> None:
    many = [
        params(grammar, temperature=temperature)
        for grammar in (
            Grammar.regex(r"\d{3}-[a-f]{2}/\w"),
            COLOURS,
            Grammar.lark('start: item ("," item){2}\nitem: /[x-z]+/ | "é"'),
            Grammar.json_schema({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                                 "additionalProperties": False}),
        )
    ]  # fmt: skip
    number, colour, items, ok = (output.outputs[0] for output in llm.generate([PROMPT] * 4, many))
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}/[0-9A-Za-z_]", number.text)
    assert colour.text in COLOURS.choices
    assert re.fullmatch(r"([x-z]+|é)(,([x-z]+|é)){2}", items.text) or items.finish_reason == "length"
    assert set(json.loads(ok.text)) == {"ok"}


def test_any_object_is_one(llm: LLM) -> None:
    found = [answer(llm, params(Grammar.json_object(), seed, max_tokens=120)) for seed in range(3)]
    for one in found:
        assert one.text.startswith("{")
        if one.finish_reason == "stop":
            assert isinstance(json.loads(one.text), dict)


# ---- the end of an answer


def test_the_answer_ends_with_the_last_token_that_can_be(llm: LLM) -> None:
    """No pass is spent on an end-of-sequence token that is the only one left, and ignore_eos changes nothing."""
    for ignore_eos in (False, True):
        one = answer(llm, params(Grammar.regex("[0-9]{4}"), ignore_eos=ignore_eos))
        assert re.fullmatch("[0-9]{4}", one.text)
        assert (one.finish_reason, one.stop_reason) == ("stop", None)
        assert EOS not in one.token_ids


def test_end_of_sequence_only_where_the_grammar_may_end(llm: LLM) -> None:
    """However likely it is made."""
    eager = {EOS: 100.0}
    one = answer(llm, params(Grammar.regex("abc(0|1)*"), logit_bias=eager))
    assert (one.text, one.finish_reason, one.token_ids[-1]) == ("abc", "stop", EOS)
    going_on = answer(llm, params(Grammar.regex("abc(0|1)*"), logit_bias=eager, ignore_eos=True, max_tokens=12))
    assert going_on.finish_reason == "length"
    assert EOS not in going_on.token_ids
    assert re.fullmatch("abc[01]+", going_on.text)


def test_min_tokens_hold_back_the_end_until_the_grammar_leaves_no_other(llm: LLM) -> None:
    eager = {EOS: 100.0}
    longer = answer(llm, params(Grammar.regex("a[01]*"), logit_bias=eager, min_tokens=9))
    assert (longer.finish_reason, len(longer.token_ids)) == ("stop", 10)
    complete = answer(llm, params(Grammar.choice(["a"]), min_tokens=9))
    assert (complete.text, complete.finish_reason) == ("a", "stop")


def test_stop_strings_and_stop_tokens_end_an_answer_within_its_grammar(llm: LLM, tokenizer: Tokenizer) -> None:
    grammar = Grammar.regex("00001111")
    found = answer(llm, params(grammar, stop=["011"]))
    assert (found.text, found.stop_reason) == ("000", "011")
    (one,) = tokenizer.encode("1", add_special_tokens=False)
    found = answer(llm, params(grammar, stop_token_ids=[one], logit_bias={one: 100.0}))
    assert (found.text, found.stop_reason) == ("0000", one)
    extra = 630  # one that the tokenizer does not know ends it where the grammar may end, and not before
    found = answer(llm, params(Grammar.regex("a1*"), stop_token_ids=[extra], logit_bias={extra: 100.0}))
    assert (found.text, found.stop_reason) == ("a", extra)


def test_the_grammar_wins_over_what_leaves_it_no_token(llm: LLM) -> None:
    """bad_words forbid all that the grammar allows: the answer fits, nobody draws from nothing."""
    found = answer(llm, params(Grammar.choice(["yes", "no"]), bad_words=["y", "n", "ye", "no", "yes"]))
    assert found.text in ("yes", "no")


# ---- with other options, and beside others


def test_logprobs_are_those_of_the_unmodified_distribution(llm: LLM) -> None:
    plain = answer(llm, params(None, max_tokens=1, logprobs=20))
    held = answer(llm, params(Grammar.regex("[0-9]+"), max_tokens=1, logprobs=20))
    assert plain.logprobs is not None
    assert held.logprobs is not None
    likeliest = list(held.logprobs[0].values())[1:]
    assert {entry.token_id for entry in likeliest} <= set(plain.logprobs[0])
    for entry in likeliest:
        assert entry.logprob == pytest.approx(plain.logprobs[0][entry.token_id].logprob, abs=1e-5)


def test_neighbours_with_and_without_a_grammar_change_nothing(llm: LLM, path: Path, store_root: Path) -> None:
    """Nor does a cut into stages: masks are of the request alone."""
    every = {"temperature": 1.2, "top_k": 60, "repetition_penalty": 1.3, "presence_penalty": 0.5, "max_tokens": 25}
    many = [
        params(Grammar.regex("[a-z ]*"), 3, **every),
        params(None, 4, ignore_eos=True, **every),
        params(Grammar.json_object(), 5, n=2, **every),
        params(COLOURS, 6, n=2, best_of=4, **every),
        params(None, 7, temperature=0, max_tokens=9),
    ]
    prompts = [PROMPT, [9, 10], PROMPT, [11] * 9, [40, 41]]

    def texts(engine: LLM, *indices: int) -> list[list[list[int]]]:
        outputs = engine.generate([prompts[index] for index in indices], [many[index] for index in indices])
        return [[one.token_ids for one in output.outputs] for output in outputs]

    together = texts(llm, 0, 1, 2, 3, 4)
    assert [texts(llm, index)[0] for index in range(5)] == together
    with LLM(run_config(path, store_root, pipeline=2)) as cut:
        assert texts(cut, 0, 1, 2, 3, 4) == together


def test_preempted_answers_go_on_where_they_were(llm: LLM, path: Path, store_root: Path) -> None:
    """The place in the grammar is made again from the tokens: a mask from the beginning would not fit."""
    grammar = Grammar.regex(r"(\([a-z]{1,9}\)[0-9]{1,9};)*")
    many = [params(grammar, seed, max_tokens=50, ignore_eos=True) for seed in range(6)]
    expected = [output.outputs[0] for output in llm.generate([PROMPT] * 6, many)]
    with LLM(run_config(path, store_root, kv_memory="96 KiB", max_model_len=64, max_requests=6)) as small:
        found = [output.outputs[0] for output in small.generate([PROMPT] * 6, many)]
        assert small.stats.num_preemptions > 0
        small.integrity()
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


@pytest.mark.slow
def test_two_tensor_ranks_in_two_stages(llm: LLM, path: Path, store_root: Path) -> None:
    """Over a wire: grammar and vocabulary are in the messages; ranks that draw nothing follow no grammar."""
    many = [params(Grammar.regex("[a-z]{20}"), 3), params(None, 4, temperature=0), params(COLOURS, 5)]
    with LLM(run_config(path, store_root, tensor=2, pipeline=2)) as two:
        held, _, colour = (output.outputs[0].text for output in two.generate([PROMPT] * 3, many))
    assert re.fullmatch("[a-z]{20}", held)
    assert colour in COLOURS.choices


# ---- bad grammars


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.lark("start: nothing"), "unknown name"),
        (Grammar.json_schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (Grammar.json_schema({"$ref": "http://127.0.0.1:9/schema"}), "does not fetch"),
        (Grammar.json_schema({"$ref": "#"}), "no answer"),
        (Grammar.json_schema({"type": "integer", "multipleOf": 1000000007}), "fuel"),
    ],
)
def test_a_broken_grammar_is_refused_before_anything_runs(llm: LLM, grammar: Grammar, message: str) -> None:
    steps = llm.stats.num_steps
    with pytest.raises(ConfigError, match=message):
        llm.generate([PROMPT, PROMPT], [params(None), params(grammar)])
    assert llm.stats.num_steps == steps


def test_a_grammar_that_takes_too_long_to_compile_is_refused_in_time(llm: LLM) -> None:
    """What compiles it cannot be stopped but from outside; the next grammar finds a new process."""
    with pytest.raises(ConfigError, match="takes longer than 1 s"):
        answer(llm, params(SLOW))
    assert answer(llm, params(COLOURS)).text in COLOURS.choices


async def test_a_grammar_that_explodes_on_its_way_fails_alone(llm: LLM) -> None:
    """It can be compiled, and its first masks found: the limits of a step end it, its neighbours go on."""
    import asyncio

    async def text(sampling: SamplingParams) -> str:
        events = [event async for event in llm.stream(PROMPT, sampling)]
        return events[-1].output.outputs[0].text

    plain = params(None, 8, ignore_eos=True, max_tokens=60)
    expected = answer(llm, plain).text
    started = time.monotonic()
    exploded, *others = await asyncio.gather(
        text(params(EXPLOSIVE, max_tokens=200, temperature=0)),
        *(text(sampling) for sampling in (plain, params(COLOURS), plain)),
        return_exceptions=True,
    )
    assert isinstance(exploded, ConfigError), exploded
    assert "the grammar cannot be used" in str(exploded)
    assert others[0] == others[2] == expected
    assert others[1] in COLOURS.choices
    assert time.monotonic() - started < 30  # not a claim about speed: it ended at all
    llm.integrity()


def test_a_model_without_tokenizer_says_so(tiny_checkpoint: Callable[..., Path], store_root: Path) -> None:
    config = run_config(tiny_checkpoint("llama"), store_root)
    with LLM(config) as bare, pytest.raises(ConfigError, match="needs a tokenizer"):
        bare.generate([PROMPT], params(COLOURS))
