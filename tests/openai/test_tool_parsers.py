"""Calls, thoughts and content out of streamed text: the same for every cut of the text, and never an exception."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_infer.openai.tools import (
    FORMATS,
    AnswerParser,
    ContentDelta,
    Delta,
    ParsedAnswer,
    Reasoning,
    ReasoningDelta,
    ToolCallDelta,
    parse_answer,
)
from dist_infer.openai.tools.deepseek import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP
from dist_infer.openai.tools.json_text import JsonText

TOOLS = ("get_weather", "add", "function")
Calls = Sequence[tuple[str, dict[str, Any]]]
CALL = {"name": "add", "arguments": {"a": 1, "b": [True, None]}}
ADD = '{"a": 1, "b": [true, null]}'


def objects(calls: Calls, key: str = "arguments") -> list[str]:
    return [json.dumps({"name": name, key: arguments}, ensure_ascii=False) for name, arguments in calls]


def deepseek_v3(calls: Calls) -> str:
    each = (f"{CALL_BEGIN}function{SEP}{n}\n```json\n{json.dumps(a)}\n```{CALL_END}" for n, a in calls)
    return CALLS_BEGIN + "\n".join(each) + CALLS_END


RENDER: dict[str, Callable[[Calls], str]] = {
    "hermes": lambda calls: "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects(calls)),
    "llama3": lambda calls: "; ".join(objects(calls, "parameters")),
    "mistral": lambda calls: f"[TOOL_CALLS] [{', '.join(objects(calls))}]",
    "mistral-args": lambda calls: "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls),
    "deepseek-v3": deepseek_v3,
    "deepseek-v31": lambda calls: (
        CALLS_BEGIN + "".join(f"{CALL_BEGIN}{n}{SEP}{json.dumps(a)}{CALL_END}" for n, a in calls) + CALLS_END
    ),
}


def make(format: str | None, *, parallel: bool = True, reasoning: Reasoning | None = None) -> AnswerParser:
    numbers = itertools.count()
    return AnswerParser(
        FORMATS[format] if format else None,
        TOOLS,
        parallel=parallel,
        reasoning=reasoning,
        new_id=lambda: f"id{next(numbers)}",
    )


def parsed(format: str | None, text: str, **settings: Any) -> ParsedAnswer:
    return parse_answer(make(format, **settings), text)


def calls_of(answer: ParsedAnswer) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    """Neighbours of one kind as one delta: what a client has put together at the end."""
    found: list[Delta] = []
    for delta in deltas:
        last = found[-1] if found else None
        if isinstance(delta, ToolCallDelta) and isinstance(last, ToolCallDelta) and delta.index == last.index:
            found[-1] = ToolCallDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
        elif isinstance(delta, ContentDelta) and isinstance(last, ContentDelta):
            found[-1] = ContentDelta(last.text + delta.text)
        elif isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            found[-1] = ReasoningDelta(last.text + delta.text)
        else:
            found.append(delta)
    return found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
some_calls = st.lists(
    st.tuples(st.sampled_from(TOOLS), st.dictionaries(st.text(max_size=8), json_values, max_size=4)),
    min_size=1,
    max_size=3,
)
# Text that is made of what the parsers look for, whole and in parts.
_PIECES = (
    *(marker for format in FORMATS.values() for marker in format.markers),
    *(
        '{"name": "add", "arguments": ',
        '{"name": "add", "parameters": {',
        ADD,
        "}",
        "[",
        "]",
        ",",
        ";",
        "\n",
        " ",
        "function",
    ),
    *(
        "add",
        "```json",
        "```",
        "<",
        "<tool",
        "[TOOL",
        "<think>",
        "</think>",
        '"',
        "\\",
        "x",
        "\u00e9",
        "{",
        '{"name": "no"',
    ),
)
marker_soup = st.lists(st.sampled_from(_PIECES), max_size=14).map("".join)
formats = st.sampled_from(sorted(FORMATS))


@pytest.mark.parametrize("format", sorted(FORMATS))
@settings(max_examples=30, deadline=None)
@given(calls=some_calls)
def test_written_calls_are_read_back(format: str, calls: Calls) -> None:
    """Rule: parse(render(calls)) == calls, with nothing left over as content, for any JSON in the arguments."""
    answer = parsed(format, RENDER[format](calls))
    assert calls_of(answer) == list(calls)
    assert (answer.content, answer.finish_reason) == (None, "tool_calls")


@settings(max_examples=200, deadline=None)
@given(format=formats, text=marker_soup, data=st.data(), started=st.sampled_from((None, False, True)))
def test_the_cut_of_the_text_changes_nothing(format: str, text: str, data: st.DataObject, started: bool | None) -> None:
    """Rule: any split gives the same joined deltas, the same reason and the same broken calls; and nothing raises."""
    reasoning = None if started is None else Reasoning(has_started=started)
    whole, cut = make(format, reasoning=reasoning), make(format, reasoning=reasoning)
    expected = whole.push(text)
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    found = [d for a, b in itertools.pairwise([0, *places, len(text)]) for d in cut.push(text[a:b])]
    end, cut_end = whole.flush(), cut.flush()
    assert joined(found + cut_end.deltas) == joined(expected + end.deltas)
    assert (cut_end.finish_reason, cut_end.broken) == (end.finish_reason, end.broken)


@settings(max_examples=200, deadline=None)
@given(format=formats, text=marker_soup)
def test_arguments_that_are_given_are_json_objects(format: str, text: str) -> None:
    """Rule: a call that is not reported as broken has arguments that load, a known name and an id."""
    parser = make(format)
    deltas = parser.push(text)
    ended = parser.flush()
    broken = {call.index for call in ended.broken}
    for delta in joined(deltas + ended.deltas):
        if isinstance(delta, ToolCallDelta) and delta.index not in broken:
            assert isinstance(json.loads(delta.arguments), dict)
            assert delta.name in TOOLS
            assert delta.id


@settings(max_examples=100, deadline=None)
@given(format=formats, text=st.text(alphabet=st.characters(blacklist_characters="<[{")))
def test_plain_text_comes_out_as_it_was(format: str, text: str) -> None:
    """Guards content against trimmed blanks and lost characters where there is no call."""
    assert parsed(format, text).content == (text or None)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_content_around_calls(format: str) -> None:
    """Content before calls is given at once; the blanks between it and the calls belong to the format."""
    if format == "llama3":
        text = 'Let me see.\n<|python_tag|>{"name": "add", "parameters": {}}'
    else:
        text = "Let me see.\n\n" + RENDER[format]([("add", {})])
    parser = make(format)
    assert parser.push(text[:11]) == [ContentDelta("Let me see.")]
    assert parser.push(text[11:])[0] == ToolCallDelta(0, "id0", "add", "{}")
    assert parser.flush().finish_reason == "tool_calls"


def test_arguments_are_streamed() -> None:
    """Guards against holding a long argument until the call has ended."""
    parser = make("hermes")
    parser.push('<tool_call>\n{"name": "add", "arguments": {"text": "')
    assert parser.push("one ") == [ToolCallDelta(0, None, None, "one ")]
    assert parser.push("two") == [ToolCallDelta(0, None, None, "two")]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("hermes", '<tool_call>{"arguments": ' + ADD + ', "name": "add"}</tool_call>'),  # the other order
        ("hermes", f'<tool_call>{{"name": "add", "arguments": {json.dumps(ADD)}}}</tool_call>'),  # packed twice
        ("hermes", '<tool_call>{"name": "add", "arguments": ' + ADD + "}}\n</tool_call>"),  # a brace too many
        ("hermes", '<tool_call>{"name": "add", "arguments": ' + ADD),  # ended before the object did
        ("hermes", '<tool_call>\n{"id": 7, "name": "add", "arguments": ' + ADD + "}"),  # no closing tag
        ("llama3", '<|python_tag|>{"type": "function", "name": "add", "parameters": ' + ADD + "}"),
        ("llama3", ' \n{"name": "add", "arguments": ' + ADD + "};"),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": ' + ADD + ', "id": "abcdefghi"}]'),
        ("mistral", "[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]" + ADD),
        ("mistral-args", "[TOOL_CALLS] add" + ADD),
        ("deepseek-v3", f"{CALL_BEGIN}function{SEP}add\n{ADD}{CALL_END}"),  # no fence, no outer pair
        ("deepseek-v3", f"{CALLS_BEGIN}{CALL_BEGIN}function{SEP}add\n```json\n{ADD}"),
    ],
)
def test_what_models_really_write(format: str, text: str) -> None:
    """Slips that leave no doubt about the call are forgiven."""
    answer = parsed(format, text)
    assert calls_of(answer) == [("add", CALL["arguments"])]
    assert answer.content is None


def test_mistral_keeps_its_own_id() -> None:
    """The template of the next turn must find the id that the model chose."""
    for text in (
        '[TOOL_CALLS][{"name": "add", "id": "abcdefghi", "arguments": {}}]',
        "[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{}",
    ):
        assert [call.id for call in parsed("mistral", text).calls] == ["abcdefghi"]


def test_made_ids_fit_mistral() -> None:
    """Mistral's templates raise for an id that is not nine letters and digits."""
    call = parse_answer(AnswerParser(FORMATS["mistral"], TOOLS), "[TOOL_CALLS]add[ARGS]{}").calls[0]
    assert len(call.id) == 9
    assert call.id.isalnum()


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("hermes", "<tool_call>not json</tool_call>"),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),  # no such tool
        ("hermes", '<tool_call>{"name": "add", "arguments": 7}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1'),  # cut off
        ("hermes", "<tool_call>" + '{"a":' * 300),
        ("hermes", "<tool_ca"),
        ("llama3", '{"answer": 42}'),
        ("llama3", 'so: {"name": "add", "parameters": {}}'),  # not the first thing, and no tag
        ("llama3", "<|python_tag|>print(1)"),
        ("mistral", "[TOOL_CALLS] []"),
        ("mistral", '[TOOL_CALLS] [{"name": "add"'),
        ("mistral-args", "[TOOL_CALLS]rm[ARGS]{}"),
        ("mistral-args", "[TOOL_CALLS]add[AR"),
        ("mistral-args", "[TOOL_CALLS]add[ARMS]{}"),
        ("deepseek-v3", f"{CALLS_BEGIN}{CALL_BEGIN}function{SEP}rm\n```json\n{{}}\n```"),
        ("deepseek-v3", f"{CALLS_BEGIN}{CALL_BEGIN}function<x"),
        ("deepseek-v31", f"{CALLS_BEGIN}{CALLS_END}"),
        ("deepseek-v31", f"{CALLS_BEGIN}hello"),
    ],
)
def test_what_is_no_call_is_content(format: str, text: str) -> None:
    """Rule: malformed calls degrade to the very text that the model wrote."""
    answer = parsed(format, text)
    assert (answer.content, answer.calls, answer.finish_reason) == (text, (), None)


def test_a_good_call_behind_a_bad_one_is_found() -> None:
    """A character that ends a bad call may be the first of the next marker."""
    answer = parsed("hermes", '<tool_call><tool_call>{"name": "add", "arguments": {}}</tool_call> done')
    assert (answer.content, calls_of(answer)) == ("<tool_call>done", [("add", {})])


def test_a_call_that_was_not_closed_hides_nothing() -> None:
    """What stands where the closing tag should be is read as content, the next call included."""
    call = '<tool_call>{"name": "add", "arguments": {}}'
    answer = parsed("hermes", f"{call}\n{call}</to do>")
    assert (answer.content, calls_of(answer)) == ("</to do>", [("add", {})] * 2)


NO_JSON = (
    *(
        "[01]",
        "[-01]",
        "[1.]",
        "[.5]",
        "[-]",
        "[1e+]",
        "[+1]",
        '["\\u12g4"]',
        '["\\x"]',
        "[tru]",
        "[1 2]",
        "[,]",
        "[1,]",
    ),
    *('{"a":1,}', '{"a"}', "{1:2}", "{]", "[NaN]", "7", '"a"', "[]]", ""),
)


@pytest.mark.parametrize("text", NO_JSON)
def test_the_checker_refuses(text: str) -> None:
    """Each way to be no object or array, named, since random texts seldom find all of them."""
    checker = JsonText()
    assert not (all(checker.push(char) is not None for char in text) and checker.is_done)


def test_a_line_end_inside_a_text_is_escaped() -> None:
    """Models write code with real line ends into arguments, which strict JSON refuses."""
    answer = parsed("hermes", '<tool_call>{"name": "add", "arguments": {"code": "a\nb\tc"}}</tool_call>')
    assert calls_of(answer) == [("add", {"code": "a\nb\tc"})]


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_one_call_when_one_is_wanted(format: str) -> None:
    """parallel_tool_calls: false keeps the first call, says that the answer may be ended, and drops the rest."""
    parser = make(format, parallel=False)
    text = RENDER[format]([("add", {}), ("get_weather", {})])
    assert not parser.wants_stop
    deltas = parser.push(text)
    assert parser.wants_stop
    assert joined(deltas) == [ToolCallDelta(0, "id0", "add", "{}")]
    assert parser.flush().deltas == []


@pytest.mark.parametrize(
    ("started", "text", "reasoning", "content"),
    [
        (False, "<think>\nhm, 1 < 2\n</think>\n\nyes", "hm, 1 < 2", "yes"),
        (False, "\n<think>a</think>b", "a", "b"),
        (False, "no <think>a</think>", None, "no <think>a</think>"),
        (False, "<thi", None, "<thi"),
        (False, "<think>never ends </thin", "never ends </thin", None),
        (False, "<think>\n\n</think>\n\nyes", None, "yes"),
        (True, "hm\n</think>\nyes", "hm", "yes"),
        (True, "<think>\nhm</think>yes", "hm", "yes"),  # some write the tag again
        (True, "  <th", "<th", None),
        (True, "hm", "hm", None),
    ],
)
def test_thoughts(started: bool, text: str, reasoning: str | None, content: str | None) -> None:
    """The thought is told from the answer, also for a model whose prompt ends inside it."""
    answer = parsed("hermes", text, reasoning=Reasoning(has_started=started))
    assert (answer.reasoning, answer.content) == (reasoning, content)


def test_a_call_in_a_thought_is_a_thought() -> None:
    """Only what follows the thought is done."""
    call = RENDER["hermes"]([("add", {})])
    answer = parsed("hermes", f"<think>{call}</think>{call}", reasoning=Reasoning())
    assert (answer.reasoning, len(answer.calls), answer.content) == (call, 1, None)


def test_without_tools_nothing_is_a_call() -> None:
    """tool_choice none: the text is the client's as it is."""
    text = RENDER["hermes"]([("add", {})])
    assert parse_answer(AnswerParser(FORMATS["hermes"], ()), text).content == text
    assert parsed(None, text).content == text


@settings(max_examples=200, deadline=None)
@given(
    text=st.one_of(st.text(alphabet='{}[]":,0123456789.eE+-truefalsn\\u \n', max_size=24), json_values.map(json.dumps))
)
def test_the_checker_agrees_with_json(text: str) -> None:
    """The character checker takes exactly the objects and arrays that json.loads takes (strictly, from one text)."""
    checker = JsonText()
    body = text.strip(" \n")
    accepted = body != "" and all(checker.push(char) is not None for char in body) and checker.is_done
    try:
        value = json.loads(body, strict=False, parse_constant=lambda name: pytest.fail(name))
    except ValueError:
        assert not accepted
    else:
        assert accepted == isinstance(value, dict | list)
