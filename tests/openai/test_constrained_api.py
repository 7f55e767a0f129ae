"""Constraints and forced calls through the endpoint, by a real engine: what comes fits, whoever asks beside it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from demo_model import SMOLLM2
from openai import BadRequestError, OpenAI
from served_model import Served, assert_idle, wait_until

from dist_infer import LLM, Grammar
from dist_infer.serve_config import ServeLimits

USER: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": f"The {name}", "parameters": SCHEMA}}
    for name in ("weather", "tides")
]
NAMED = {"type": "function", "function": {"name": "tides"}}
# compiled in minutes, if at all: found by the deadline of the process that tries it
SLOW = "start: X\nX: " + " & ".join(f"/(.{{{n}}})*/" for n in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29))

EXPLOSIVE = r"(\w{1,500}\s?){1,500}"  # compiled at once; its states multiply with each character


def strict(schema: dict[str, Any], strict: bool = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": strict, "schema": schema}}


@pytest.fixture(scope="module")
def endpoint(llm: LLM) -> Iterator[Served]:
    """The tiny model, as if it wrote calls as Hermes does."""
    made = Served(llm, ServeLimits(), formats={"tool_format": "hermes"})
    yield made
    made.close()
    assert_idle(llm)


@pytest.fixture
def client(endpoint: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def calls_of(client: OpenAI, stream: bool, **options: Any) -> list[tuple[str, Any, str | None]]:
    """(name, arguments, finish reason) of each call."""
    options = {"model": "tiny", "messages": USER, "max_tokens": 200, "temperature": 0.8, "seed": 4, **options}
    if not stream:
        choice = client.chat.completions.create(**options).choices[0]
        assert choice.message.content is None
        found: list[Any] = choice.message.tool_calls or []
        return [(each.function.name, json.loads(each.function.arguments), choice.finish_reason) for each in found]
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    for chunk in client.chat.completions.create(**options, stream=True):
        choice = chunk.choices[0]
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            names.setdefault(call.index, call.function.name or "")
            texts[call.index] = texts.get(call.index, "") + (call.function.arguments or "")
    return [(names[index], json.loads(text), choice.finish_reason) for index, text in texts.items()]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls(client: OpenAI, choice: Any, parallel: bool, stream: bool) -> None:
    """Rule: whatever the model, a forced answer is calls of the tools whose arguments fit, and nothing else."""
    found = calls_of(client, stream, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel)
    assert found
    assert parallel or len(found) == 1
    for name, arguments, reason in found:
        jsonschema.validate(arguments, SCHEMA)
        assert name == "tides" if choice is NAMED else name in ("weather", "tides")
        assert reason in ("tool_calls", "length") if parallel else reason == "tool_calls"


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("guided_regex", "[a-c]{3}-[0-9]{2}", "[a-c]{3}-[0-9]{2}"),
        ("guided_choice", ["yes", "no"], "yes|no"),
        ("guided_grammar", 'start: "a"{2,4} "b"', "a{2,4}b"),
        ("guided_json", SCHEMA, None),
        ("guided_json", json.dumps(SCHEMA), None),
        ("structured_outputs", {"regex": "x{4}"}, "x{4}"),
        ("structured_outputs", {"choice": ["one", "two"]}, "one|two"),
        ("structured_outputs", {"grammar": 'start: "q"'}, "q"),
        ("structured_outputs", {"json": SCHEMA}, None),
    ],
)
def test_constraints(http_of: httpx.Client, route: str, field: str, value: Any, pattern: str | None) -> None:
    """Guards each way to say it, on both routes: the whole answer fits, and ends by itself."""
    body = {"max_tokens": 120, "temperature": 1.0, "seed": 2, field: value}
    if route == "chat":
        answer = http_of.post("/v1/chat/completions", json={**body, "messages": USER}).json()
        text = answer["choices"][0]["message"]["content"]
    else:
        answer = http_of.post("/v1/completions", json={**body, "prompt": "the sea"}).json()
        text = answer["choices"][0]["text"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    if pattern is None:
        jsonschema.validate(json.loads(text), SCHEMA)
    else:
        assert re.fullmatch(pattern, text)


@pytest.fixture
def http_of(endpoint: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, timeout=30) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_strict", [False, True])
def test_json_schema(client: OpenAI, is_strict: bool, stream: bool) -> None:
    """Guards response_format: kept whether strict says so or not, streamed or whole."""
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 100, "temperature": 1.0, "seed": 9}
    options["response_format"] = strict(SCHEMA, is_strict)
    if stream:
        chunks = client.chat.completions.create(**options, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.chat.completions.create(**options).choices[0].message.content or ""
    jsonschema.validate(json.loads(text), SCHEMA)


def test_json_object_and_text(client: OpenAI) -> None:
    """Guards the two kinds without a schema."""
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 40, "temperature": 0}
    plain = client.chat.completions.create(**options).choices[0].message.content
    text = client.chat.completions.create(**options, response_format={"type": "text"}).choices[0].message.content
    assert text == plain
    answer = client.chat.completions.create(**options, response_format={"type": "json_object"}).choices[0]
    assert (answer.message.content or "").startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content or ""), dict)


TWO: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_regex": "a", "guided_json": {}}, "guided_json", "guided_regex"),
    ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "guided_choice", "structured_outputs.regex"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.json", "structured_outputs.regex"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format", "guided_regex"),
    ({"response_format": strict(SCHEMA), "tools": TOOLS}, "tools", "response_format"),
    ({"guided_regex": "a", "tools": TOOLS, "tool_choice": "required"}, "tools", "guided_regex"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "first", "second"), TWO, ids=lambda value: value if isinstance(value, str) else "")
def test_two_constraints_are_refused(http_of: httpx.Client, fields: dict[str, Any], first: str, second: str) -> None:
    """Rule: one of two would be lost, so both are named."""
    answer = http_of.post("/v1/chat/completions", json={"messages": USER, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == second
    assert f"`{first}`" in error["message"]
    assert f"`{second}`" in error["message"]


def test_a_broken_grammar_is_its_request_s_alone(client: OpenAI) -> None:
    """Guards the library's own words: they come with the field, and the next request is served."""
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=USER, extra_body={"guided_grammar": 'start: "a" nothing'})
    assert isinstance(caught.value.body, dict)
    assert (caught.value.body["param"], caught.value.body["code"]) == ("guided_grammar", "invalid_grammar")
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices[0].text is not None


def test_neighbours_of_an_explosive_grammar(endpoint: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: it fails by its deadline; streams, tokenizers and grammars that are known go on meanwhile."""
    url = f"{endpoint.url}/v1/completions"
    known = {"prompt": "x", "guided_choice": ["yes", "no"], "max_tokens": 8}
    assert httpx.post(url, json=known, timeout=30).status_code == 200  # the process is there, and the grammar known
    entered, leave, tried = threading.Event(), threading.Event(), []
    checker = llm._grammars
    assert checker is not None
    inner = checker._try

    def held(line: bytes) -> Any:
        tried.append(line)
        entered.set()
        leave.wait(20)
        return inner(line)

    monkeypatch.setattr(checker, "_try", held)
    bad: list[httpx.Response] = []
    body = {"prompt": "x", "guided_grammar": SLOW}
    running = threading.Thread(target=lambda: bad.append(httpx.post(url, json=body, timeout=30)))
    running.start()
    assert entered.wait(10)
    answers = [httpx.post(url, json={"prompt": "the sea", "max_tokens": 4}, timeout=30), httpx.post(url, json=known)]
    assert [answer.status_code for answer in answers] == [200, 200]
    leave.set()
    running.join(20)
    error = bad[0].json()["error"]
    assert (bad[0].status_code, error["param"]) == (400, "guided_grammar")
    assert "longer than 1 s" in error["message"]
    assert httpx.post(url, json=body, timeout=30).status_code == 400
    assert len(tried) == 1  # remembered
    assert_idle(llm)


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_explodes_on_its_way(http_of: httpx.Client, stream: bool) -> None:
    """Guards what only its first masks were tried of: the error names the field, in a stream that has begun
    as its last event."""
    body = {"prompt": "the sea", "max_tokens": 200, "temperature": 0, "guided_regex": EXPLOSIVE, "stream": stream}
    answer = http_of.post("/v1/completions", json=body)
    if answer.status_code == 200:  # a stream that had begun
        assert stream
        *_, last, done = answer.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 400
        error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("guided_regex", "invalid_grammar")
    plain = http_of.post("/v1/completions", json={"prompt": "the sea", "max_tokens": 4})
    assert plain.status_code == 200


def test_too_many_new_grammars(endpoint: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 8: what waits to be compiled is bounded; the one too many is 429, and places come back."""
    leave = threading.Event()
    check = llm.check
    monkeypatch.setattr(
        llm, "check", lambda ids, params: leave.wait(20) and check(ids, params) if params.grammar else None
    )
    url = f"{endpoint.url}/v1/completions"
    answers: list[int] = []

    def post(number: int) -> None:
        body = {"prompt": "x", "guided_regex": f"a{{{number}}}b", "max_tokens": 1}
        answers.append(httpx.post(url, json=body, timeout=30).status_code)

    threads = [threading.Thread(target=post, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    wait_until(lambda: endpoint.service._num_new_grammars == 8)
    refused = httpx.post(url, json={"prompt": "x", "guided_regex": "c"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "grammar_queue_full")
    assert refused.headers["retry-after"]
    leave.set()
    for thread in threads:
        thread.join(30)
    assert answers == [200] * 8
    monkeypatch.undo()
    assert httpx.post(url, json={"prompt": "x", "guided_regex": "c", "max_tokens": 1}).status_code == 200


def test_without_llguidance(endpoint: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an installation without the extra: told, with what to install, and nothing else is lost."""
    import dist_infer.grammar_matcher

    monkeypatch.setattr(dist_infer.grammar_matcher.importlib.util, "find_spec", lambda name: None)
    answer = httpx.post(f"{endpoint.url}/v1/completions", json={"prompt": "x", "guided_regex": "never seen"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "guided_regex")
    assert "dist-infer[serve]" in error["message"]


def test_special_tokens_that_are_kept(llm: LLM, checkpoint: Path) -> None:
    """Guards markers that are special tokens, through the real detokenizer: kept ones are text, others are not."""
    from dist_infer import SamplingParams

    ids = llm.special_token_ids
    wanted = Grammar.lark(f'start: "a" <[{ids["<|eot|>"]}]> "b" <[{ids["<|im_start|>"]}]> "c"')
    for kept, text in (((), "abc"), ((ids["<|eot|>"],), "a<|eot|>bc")):
        params = SamplingParams(max_tokens=20, grammar=wanted, kept_special_token_ids=kept, logprobs=0)
        output = llm.generate("x", params)[0].outputs[0]
        assert output.text == text
        assert "".join(next(iter(each.values())).decoded_token for each in output.logprobs or []) == text


@pytest.mark.slow
def test_a_real_model_uses_them(store_root: Path) -> None:
    """SmolLM2, which was taught no calls: forced ones fit all the same, and say what was asked; so does JSON."""
    config: dict[str, Any] = {
        "model": {"path": SMOLLM2},
        "offload": {"store": str(store_root)},
        "engine": {"max_requests": 4, "max_model_len": 1024, "kv_memory": "64 MiB"},
        "cluster": {"device": "cpu"},
    }
    tools: list[Any] = [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "maxLength": 30}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            },
        }
    ]
    country = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 30}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    with LLM(config) as llm:
        served = Served(llm, ServeLimits(), formats={"tool_format": "hermes"})
        try:
            with OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=120) as client:
                options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 80}
                answer = client.chat.completions.create(messages=USER, tools=tools, tool_choice="required", **options)
                calls: list[Any] = answer.choices[0].message.tool_calls or []
                assert "Paris" in json.loads(calls[0].function.arguments)["city"].title()
                answer = client.chat.completions.create(
                    messages=[{"role": "user", "content": "What is the capital of France? Answer in JSON."}],
                    response_format=strict(country),  # type: ignore[arg-type]
                    **options,
                )
                assert json.loads(answer.choices[0].message.content or "")["capital"] == "Paris"
        finally:
            served.close()
