"""Calls, thoughts and content through the endpoint, of every format: an engine says them, the official client reads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from scripted_engine import ScriptedEngine
from served_model import Served

from dist_infer.openai.tools import FORMATS
from dist_infer.openai.tools.deepseek import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP
from dist_infer.serve_config import ServeLimits

A, B = '{"city": "Paris", "days": 2}', '{"city": "Oslo", "days": 1}'
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city", "days"],
            },
        },
    }
]
TWO_CALLS = {
    "hermes": "".join(f'<tool_call>\n{{"name": "weather", "arguments": {each}}}\n</tool_call>\n' for each in (A, B)),
    "llama3": "; ".join(f'{{"name": "weather", "parameters": {each}}}' for each in (A, B)),
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {A}}}, {{"name": "weather", "arguments": {B}}}]',
    "mistral-args": "".join(f"[TOOL_CALLS]weather[ARGS]{each}" for each in (A, B)),
    "deepseek-v3": CALLS_BEGIN
    + "\n".join(f"{CALL_BEGIN}function{SEP}weather\n```json\n{each}\n```{CALL_END}" for each in (A, B))
    + CALLS_END,
    "deepseek-v31": CALLS_BEGIN + "".join(f"{CALL_BEGIN}weather{SEP}{each}{CALL_END}" for each in (A, B)) + CALLS_END,
}
USER: list[Any] = [{"role": "user", "content": "How is the weather?"}]
Said = tuple[str | None, str | None, list[tuple[str | None, str]], str | None]


@pytest.fixture
def says() -> Iterator[Callable[..., tuple[OpenAI, ScriptedEngine]]]:
    """says(text, tool_format=..., **engine): a client of an endpoint whose model says this."""
    with contextlib.ExitStack() as stack:

        def make(
            text: str, *, tool_format: str = "auto", reasoning_format: str = "auto", **engine: Any
        ) -> tuple[OpenAI, ScriptedEngine]:
            made = ScriptedEngine(text=text, **engine)
            formats = {"tool_format": tool_format, "reasoning_format": reasoning_format}
            served = Served(made, ServeLimits(), formats=formats)
            stack.callback(served.close)
            client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=10)
            return stack.enter_context(client), made

        yield make


def whole(client: OpenAI, **options: Any) -> Said:
    choice = client.chat.completions.create(model="tiny", messages=USER, **options).choices[0]
    calls: list[Any] = choice.message.tool_calls or []
    found = [(call.function.name, call.function.arguments) for call in calls]
    assert all(call.id and call.type == "function" for call in calls)
    return choice.message.content, getattr(choice.message, "reasoning_content", None), found, choice.finish_reason


def streamed(client: OpenAI, **options: Any) -> Said:
    """The same, put together as clients do; `content` is None where no piece of it came."""
    content, thought, end = "", "", None
    calls: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(model="tiny", messages=USER, stream=True, **options):
        for choice in chunk.choices:
            assert end is None
            end = choice.finish_reason
            content += choice.delta.content or ""
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                assert call.function is not None
                if call.id is not None:
                    assert call.index == len(calls)
                    calls[call.index] = [call.function.name or "", ""]
                calls[call.index][1] += call.function.arguments or ""
    return content or None, thought or None, [(name, text) for name, text in calls.values()], end


@pytest.mark.parametrize("read", [whole, streamed])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_calls_of_every_format(says: Any, format: str, read: Callable[..., Said]) -> None:
    """Rule: two calls come as two calls, with their arguments and "tool_calls", whatever the format and the way."""
    client, engine = says(TWO_CALLS[format], tool_format=format)
    assert read(client, tools=TOOLS) == (None, None, [("weather", A), ("weather", B)], "tool_calls")
    assert engine.conversations[0]["tools"] == TOOLS


@pytest.mark.parametrize("read", [whole, streamed])
def test_what_is_no_call_is_content(says: Any, read: Callable[..., Said]) -> None:
    """Guards an answer with tools that calls none, and a text with a call where no tools were given."""
    client, _ = says("It is <b>warm</b>. <tool_c", tool_format="hermes")
    assert read(client, tools=TOOLS) == ("It is <b>warm</b>. <tool_c", None, [], "stop")
    client, engine = says(TWO_CALLS["hermes"], tool_format="hermes")
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        assert read(client, **options) == (TWO_CALLS["hermes"], None, [], "stop")
    assert engine.conversations[-1]["tools"] is None  # the model is not shown what it may not call


@pytest.mark.parametrize("read", [whole, streamed])
def test_a_call_that_is_cut_off(says: Any, read: Callable[..., Said]) -> None:
    """Guards max_tokens inside a call: "length", and in a whole answer its text, not half of a JSON object."""
    text = TWO_CALLS["hermes"][:60]
    client, _ = says(text, tool_format="hermes", reason="length")
    content, _, calls, end = read(client, tools=TOOLS)
    assert end == "length"
    assert (content, calls) == ((text, []) if read is whole else (None, [("weather", '{"city": "Paris')]))


@pytest.mark.parametrize("read", [whole, streamed])
@pytest.mark.parametrize("begun", ["<tool_c", "<tool_call>\n{"])
def test_a_forced_answer_has_no_content(says: Any, begun: str, read: Callable[..., Said]) -> None:
    """Guards a forced answer that is cut off in a further call: the beginning of that is no content."""
    first = TWO_CALLS["hermes"].partition("</tool_call>\n")[0] + "</tool_call>\n"
    client, _ = says(first + begun, tool_format="hermes", reason="length")
    found = read(client, tools=TOOLS, tool_choice="required")
    assert found == (None, None, [("weather", A)], "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_the_stream_ends_with_the_one_call(says: Any, n: int, stream: bool) -> None:
    """parallel_tool_calls: false ends the request at its call, and counts no token behind it."""
    client, engine = says(TWO_CALLS["hermes"], tool_format="hermes", endless=True, piece=1)
    options: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False, "n": n, "logprobs": True}
    if stream:
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}, **options
            )
        )
        usage = chunks[-1].usage
        ends = {choice.index: choice.finish_reason for chunk in chunks for choice in chunk.choices}
        entries = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
        num_logprobs = sum(len(each or []) for each in entries)
    else:
        answer = client.chat.completions.create(model="tiny", messages=USER, **options)
        usage = answer.usage
        ends = {choice.index: choice.finish_reason for choice in answer.choices}
        num_logprobs = sum(len(choice.logprobs.content) for choice in answer.choices)
        assert [len(choice.message.tool_calls) for choice in answer.choices] == [1] * n
    needed = TWO_CALLS["hermes"].index("}}") + 1
    assert ends == dict.fromkeys(range(n), "tool_calls")
    assert usage is not None
    assert usage.completion_tokens == num_logprobs == n * needed
    assert engine.aborted


THINKS = "{% if tools %}<tool_call>{% endif %}<think></think>"


@pytest.mark.parametrize("read", [whole, streamed])
@pytest.mark.parametrize("has_started", [False, True])
def test_thoughts(says: Any, has_started: bool, read: Callable[..., Said]) -> None:
    """Guards reasoning_content, found from the template; before calls, before content, and left out on request."""
    begin = "" if has_started else "<think>\n"
    prompt = "<|assistant|>" + ("<think>\n" if has_started else "")
    text = f"{begin}Is it warm? 1 < 2.\n</think>\n\n"
    client, _ = says(f"{text}Yes.", chat_template=THINKS, prompt=prompt)
    assert read(client) == ("Yes.", "Is it warm? 1 < 2.", [], "stop")
    assert read(client, extra_body={"include_reasoning": False}) == ("Yes.", None, [], "stop")
    client, _ = says(text + TWO_CALLS["hermes"], chat_template=THINKS, prompt=prompt)
    assert read(client, tools=TOOLS) == (None, "Is it warm? 1 < 2.", [("weather", A), ("weather", B)], "tool_calls")
    client, _ = says(f"{text}Yes.", chat_template=THINKS, prompt=prompt, reasoning_format="none")
    assert read(client) == (f"{text}Yes.", None, [], "stop")


def test_named_formats(says: Any) -> None:
    """Guards run.reasoning_format and run.tool_format: what the operator names holds whatever the template says."""
    client, _ = says("[THINK]hm[/THINK]no", reasoning_format="mistral")
    assert whole(client) == ("no", "hm", [], "stop")
    client, _ = says(TWO_CALLS["hermes"], chat_template=THINKS, tool_format="none")
    with pytest.raises(Exception, match=r"tools cannot be used.*run\.tool_format"):
        whole(client, tools=TOOLS)


def test_markers_that_are_special_tokens_are_kept(says: Any) -> None:
    """Guards formats whose markers a detokenizer leaves out: the engine is told which to keep, for this request."""
    special = {"[TOOL_CALLS]": 5, "[ARGS]": 9, "</s>": 2, "<think>": 11, "</think>": 12}
    template = "{% if tools %}[TOOL_CALLS][ARGS]{% endif %}</think>"
    client, engine = says(TWO_CALLS["mistral-args"], chat_template=template, special_token_ids=special)
    whole(client, tools=TOOLS)
    whole(client)
    assert [set(params.kept_special_token_ids) for params in engine.asked] == [{5, 9, 11, 12}, {11, 12}]


def test_forced_and_strict_calls_are_grammars(says: Any) -> None:
    """Guards what the engine is asked: required, named and strict functions constrain it, plain auto does not."""
    client, engine = says(TWO_CALLS["hermes"], tool_format="hermes")
    strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]
    named = {"type": "function", "function": {"name": "weather"}}
    for options in (
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": named},
        {"tools": strict},
        {"tools": strict, "tool_choice": "none"},
    ):
        whole(client, **options)
    assert [params.grammar is not None for params in engine.asked] == [False, True, True, True, False]


def test_a_constraint_leaves_room_for_the_thought(says: Any) -> None:
    """Guards json_schema on a model that thinks first: the grammar begins behind the thought."""
    client, engine = says('<think>hm</think>{"a": 1}', chat_template=THINKS)
    found = whole(client, response_format={"type": "json_object"})
    assert found == ('{"a": 1}', "hm", [], "stop")
    grammar = engine.asked[-1].grammar
    assert grammar is not None
    assert grammar.text.startswith("start: (")
    whole(client, extra_body={"guided_grammar": 'start: "x"'})  # the whole answer, as the client wrote it
    assert engine.asked[-1].grammar is not None
    assert engine.asked[-1].grammar.text == 'start: "x"'


ANSWERED: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "refusal": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": A}}],
}
OUTPUT = {"role": "tool", "tool_call_id": "c1", "content": "20 degrees"}


@pytest.mark.parametrize(
    ("template", "arguments", "content"),
    [
        ("{{ tool_call.arguments | tojson }}", json.loads(A), ""),
        ("{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}", json.loads(A), ""),
        ("{{- tool['function']['name'] + '\n' + tool['function']['arguments'] + '\n' }}", A, ""),
        ("{% if m['content'] is none %}{{ '\n' + tool['function']['arguments'] + '\n' }}", A, None),
    ],
)
def test_calls_go_back_into_the_conversation(says: Any, template: str, arguments: object, content: str | None) -> None:
    """Guards arguments against being quoted twice, or added to a text as an object: as the template writes them. And
    the content that is not there: most templates join it, some ask whether it is none."""
    client, engine = says("Warm.", chat_template=template)
    first = client.chat.completions.create(model="tiny", messages=[*USER, ANSWERED, OUTPUT])
    client.chat.completions.create(model="tiny", messages=[*USER, first.choices[0].message, USER[0]])
    (_, call, output), (_, again, _) = [each["messages"] for each in engine.conversations]
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": arguments}
    assert call["content"] == content
    assert output == OUTPUT
    assert again == {"role": "assistant", "content": "Warm."}


def test_the_client_s_own_answer_is_taken_back(says: Any) -> None:
    """Guards the loop of every agent: the message that came, appended as it is, with the tool's answer behind it."""
    client, engine = says(TWO_CALLS["hermes"], tool_format="hermes")
    message = client.chat.completions.create(model="tiny", messages=USER, tools=TOOLS).choices[0].message
    outputs: list[Any] = [{**OUTPUT, "tool_call_id": call.id} for call in message.tool_calls or []]
    client.chat.completions.create(model="tiny", messages=[*USER, message, *outputs], tools=TOOLS)
    assert [call["function"]["arguments"] for call in engine.conversations[1]["messages"][1]["tool_calls"]] == [
        json.loads(A), json.loads(B),
    ]  # fmt: skip


def test_priority_reaches_the_engine(says: Any) -> None:
    """Guards priority on both routes."""
    client, engine = says("x")
    client.chat.completions.create(model="tiny", messages=USER, extra_body={"priority": -3})
    client.completions.create(model="tiny", prompt="x", extra_body={"priority": 7})
    client.completions.create(model="tiny", prompt="x")
    assert engine.priorities == [-3, 7, 0]


def test_logprobs_are_of_every_token(says: Any) -> None:
    """Guards log-probabilities beside calls: one for each token that was written, markers and held-back text too."""
    client, _ = says(TWO_CALLS["hermes"], tool_format="hermes")
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": TOOLS, "logprobs": True}
    logprobs = client.chat.completions.create(**options).choices[0].logprobs
    assert logprobs is not None
    assert "".join(entry.token for entry in logprobs.content or []) == TWO_CALLS["hermes"]
    pieces = [c.choices[0].logprobs for c in client.chat.completions.create(**options, stream=True)]
    tokens = [entry.token for piece in pieces if piece for entry in piece.content or []]
    assert "".join(tokens) == TWO_CALLS["hermes"]


def test_no_format_for_this_model(says: Any) -> None:
    """Rule: what cannot work is a 400 that names it; tool_choice none needs no format."""
    client, _ = says("x")
    body = {"messages": USER, "tools": TOOLS}
    url = f"{client.base_url}chat/completions"
    answer = httpx.post(url, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert httpx.post(url, json={**body, "tool_choice": "none"}).status_code == 200
