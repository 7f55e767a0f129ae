"""What clients get, through the official client: whole and streamed answers are the engine's own."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import OpenAI

from dist_infer import LLM, SamplingParams

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Say it, naïve café 你好"}]}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def test_chat_is_what_the_engine_says(client: OpenAI, llm: LLM) -> None:
    """Guards the translation of messages and parameters."""
    answer = client.chat.completions.create(**ASK, **GREEDY)
    (expected,) = llm.chat(ASK["messages"], SamplingParams(temperature=0, max_tokens=12))
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].finish_reason == expected.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)


def test_chat_stream_joins_to_the_whole(client: OpenAI) -> None:
    """Guards the chunks: every choice begins with a role, ends once, and its pieces are the whole answer."""
    options: dict[str, Any] = {**ASK, "temperature": 1.2, "max_tokens": 20, "n": 3, "seed": 5}
    whole = client.chat.completions.create(**options)
    texts, ends, roles, usage = ["", "", ""], [None] * 3, [None] * 3, None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert ends[choice.index] is None
            roles[choice.index] = roles[choice.index] or choice.delta.role
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert roles == ["assistant"] * 3
    assert usage == whole.usage


def test_a_character_is_never_split(client: OpenAI) -> None:
    """Guards streams of byte-level tokens: no piece ends inside of a character that the whole answer has."""
    options: dict[str, Any] = {"model": "tiny", "prompt": "你好", "temperature": 2.0, "max_tokens": 60, "seed": 11}
    whole = client.completions.create(**options).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole
    assert "".join(pieces).count("\ufffd") == whole.count("\ufffd")


def test_chat_logprobs(client: OpenAI) -> None:
    """Guards their shape: one entry a token, the likeliest first, bytes that are the token's text."""
    answer = client.chat.completions.create(**ASK, **GREEDY, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_completions_take_every_kind_of_prompt(client: OpenAI, llm: LLM) -> None:
    """Guards choice = prompt × n + answer, and that ids and text of one prompt answer alike."""
    ids = llm.encode("the sea")
    single = client.completions.create(model="tiny", prompt="the sea", **GREEDY)
    for prompt in (ids, ["the sea", "a ship"], [ids, llm.encode("a ship")]):
        answer = client.completions.create(model="tiny", prompt=prompt, n=2, **GREEDY)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        assert answer.choices[0].text == answer.choices[1].text == single.choices[0].text
    assert len(answer.choices) == 4


def test_echo_scores_the_prompt(client: OpenAI, llm: LLM) -> None:
    """Guards what evaluations read: the prompt's log-probabilities alone, with offsets into the text."""
    answer = client.completions.create(model="tiny", prompt="the sea and", max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "the sea and"
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    (expected,) = llm.generate("the sea and", SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert expected.prompt_logprobs is not None
    pairs = zip(expected.prompt_token_ids, expected.prompt_logprobs, strict=True)
    scored = [entry[token].logprob for token, entry in pairs if entry]
    assert logprobs.token_logprobs == pytest.approx([None, *scored])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("logprobs", [None, 2])
def test_streamed_echo_is_the_whole(client: OpenAI, logprobs: int | None) -> None:
    """Guards echo in chunks, with log-probabilities that come at the end."""
    options: dict[str, Any] = {"model": "tiny", "prompt": "the sea", "echo": True, "logprobs": logprobs, **GREEDY}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.choices[0].text.startswith("the sea")
    tokens = [token for chunk in chunks if (found := chunk.choices[0].logprobs) for token in found.tokens or []]
    assert tokens == (whole.choices[0].logprobs.tokens if whole.choices[0].logprobs else [])


def test_stop_never_leaks(client: OpenAI) -> None:
    """Guards a stop string across chunk edges: neither it nor its beginning is streamed."""
    text = client.completions.create(model="tiny", prompt="the sea", **GREEDY).choices[0].text
    stop = text[3:6]
    chunks = client.completions.create(model="tiny", prompt="the sea", stop=[stop], stream=True, **GREEDY)
    pieces = [chunk.choices[0] for chunk in chunks]
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert pieces[-1].finish_reason == "stop"


EXTRAS: list[dict[str, Any]] = [
    {"top_k": 1, "temperature": 1.0},
    {"min_p": 1.0, "temperature": 1.0},
    {"ignore_eos": True, "min_tokens": 12},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"typical_p": 0.9, "top_p": 0.9, "seed": 3, "temperature": 0.8},
    {"best_of": 3, "n": 2, "temperature": 1.0, "seed": 1},
    {"logit_bias": {"77": 100}},
    {"bad_words": ["the"], "stop_token_ids": [9]},
    {"prompt_logprobs": 1},
]


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: "-".join(extra))
def test_extras_reach_the_engine(http: httpx.Client, llm: LLM, extra: dict[str, Any]) -> None:
    """Guards every sampling field against being accepted and lost."""
    fields = {"max_tokens": 12, "temperature": 0, **extra}
    answer = http.post("/v1/completions", json={"prompt": "the sea", **fields})
    assert answer.status_code == 200, answer.text
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): value for token, value in fields["logit_bias"].items()}
    (expected,) = llm.generate("the sea", SamplingParams(**fields))
    assert [choice["text"] for choice in answer.json()["choices"]] == [output.text for output in expected.outputs]
    assert ("prompt_logprobs" in answer.json()["choices"][0]) == ("prompt_logprobs" in extra)


def test_tokenize_and_back(http: httpx.Client, llm: LLM) -> None:
    """Guards both routes against the engine's own tokenizer."""
    found = http.post("/tokenize", json={"prompt": "the sea, 你好", "return_token_strs": True}).json()
    assert found["tokens"] == llm.encode("the sea, 你好")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "the sea, 你好"}
    chat = http.post("/tokenize", json={"messages": ASK["messages"]}).json()
    assert chat["tokens"] == llm.chat_prompt(ASK["messages"])[1]


def test_models_health_and_metrics(http: httpx.Client, client: OpenAI) -> None:
    """Guards what probes, clients and scrapers ask for first."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for path in ("/health", "/health/live", "/health/ready", "/health/startup"):
        assert http.get(path).status_code == 200
    assert b"dist_infer_kv_blocks_free" in http.get("/metrics").content
