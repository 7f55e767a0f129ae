"""Every bad input ends in one error of one shape, with the status and the field that the contract says."""

from __future__ import annotations

import gzip
import json
import random
import socket
from typing import Any

import httpx
import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
USER = [{"role": "user", "content": "x"}]

# (body as it is sent, status, param)
BODIES: dict[str, tuple[bytes, int, str | None]] = {
    "empty": (b"", 400, None),
    "malformed": (b"{", 400, None),
    "truncated": (b'{"prompt": "x', 400, None),
    "array": (b"[]", 400, None),
    "number": (b"7", 400, None),
    "nested": (b'{"prompt":' + b"[" * 100_000, 400, None),
    "not utf-8": (b'{"prompt": "\xff"}', 400, None),
    "lone surrogate": (b'{"prompt": "\\ud800"}', 400, "prompt"),
    "key twice": (b'{"prompt": "x", "prompt": "y"}', 400, None),
    "NaN": (b'{"prompt": "x", "temperature": NaN}', 400, None),
    "Infinity": (b'{"prompt": "x", "temperature": Infinity}', 400, None),
    "1e999": (b'{"prompt": "x", "temperature": 1e999}', 400, "temperature"),
    "huge integer": (b'{"prompt": "x", "max_tokens": ' + b"9" * 6000 + b"}", 400, None),
}
FIELDS: list[tuple[str, Any]] = [
    ("temperature", -1),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", 1e-9),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("max_tokens", 10**18),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("n", 0),
    ("n", 10**9),
    ("n", 128),  # more than can ever be open here
    ("best_of", 10**9),
    ("logprobs", 21),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"999999": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {str(token): 1 for token in range(100_000)}),
    ("stop", ""),
    ("stop", ["x"] * 10_000),
    ("stop", [""]),
    ("stop", "x" * 2000),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [-1]),
    ("prompt", [640]),
    ("prompt", [[1], []]),
    ("prompt", ["x", 1]),
    ("prompt", ["x"] * 100_000),
    ("prompt", [1] * 1000),
    ("prompt", {"text": "x"}),
    ("prompt", None),
    ("min_tokens", 100),
    ("seed", 2**64),
    ("stop_token_ids", [-1]),
    ("bad_words", [""]),
    ("stream_options", {"include_usage": True}),
    ("stream", "yes"),
    ("user", "x" * 300),
    ("suffix", "x"),
    ("priority", 1001),
    ("priority", "high"),
    ("chat_template", "{{ 1 }}"),
    ("tools", [{"type": "function"}]),
    ("guided_regex", ""),
    ("guided_regex", "("),
    ("guided_regex", "a(?=b)"),
    ("guided_regex", "\\"),
    ("guided_regex", "x" * 70_000),
    ("guided_choice", []),
    ("guided_choice", ["a"] * 5000),
    ("guided_choice", "a"),
    ("guided_grammar", "start"),
    ("guided_grammar", "start: start start"),
    ("guided_json", "{"),
    ("guided_json", "[]"),
    ("guided_json", {"type": "text"}),
    ("guided_json", {"not": {}}),
    ("guided_json", {"$ref": "http://127.0.0.1:1/schema"}),
    ("guided_json", {"enum": ["x" * 70_000]}),
    ("structured_outputs", {}),
    ("structured_outputs", {"yaml": "x"}),
    ("structured_outputs", {"json_object": False}),
    ("guided_decoding_backend", "other"),
    ("reasoning_effort", "high"),
    ("temprature", 1),
]
MESSAGES: dict[str, Any] = {
    "none": None,
    "empty": [],
    "text": "hello",
    "object": {"role": "user", "content": "x"},
    "strings": ["hello"],
    "no role": [{"content": "x"}],
    "role of nobody": [{"role": "robot", "content": "x"}],
    "content number": [{"role": "user", "content": 1}],
    "no content": [{"role": "user"}],
    "image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}],
    "part without text": [{"role": "user", "content": [{"type": "text"}]}],
    "unknown key": [{"role": "user", "content": "x", "weight": 1}],
    "too many": USER * 5000,
}


def assert_error(answer: httpx.Response, status: int, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(answer.content) < 2000
    assert error["param"] == param, error
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(("body", "status", "param"), BODIES.values(), ids=BODIES)
def test_body(http: httpx.Client, body: bytes, status: int, param: str | None) -> None:
    """Guards the reading of bodies: nothing but a JSON object goes further."""
    answer = http.post(COMPLETIONS, content=body, headers=JSON)
    assert_error(answer, status, param)


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=[f"{name}={str(value)[:24]}" for name, value in FIELDS])
def test_field(http: httpx.Client, name: str, value: Any) -> None:
    """Guards each field: what cannot be done is a 400 that names it."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4, name: value}
    answer = http.post(COMPLETIONS, content=json.dumps(body), headers=JSON)
    found = "max_tokens" if (name, value) == ("prompt", [1] * 1000) else name
    place = answer.json()["error"]["param"] or ""  # inside of a field, where that says more
    assert place.partition(".")[0] == found
    assert_error(answer, 400, place)


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_messages(http: httpx.Client, messages: Any) -> None:
    """Guards conversations of every wrong shape."""
    assert_error(http.post(CHAT, json={"messages": messages}), 400, "messages")


FUNCTION = {"type": "function", "function": {"name": "f"}}
DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"items": DEEP}
CALLED: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"if": {}}}}},
            "response_format.json_schema.schema.if",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": DEEP}}},
            ("response_format.json_schema.schema" + ".items" * 33)[:197] + "...",
        ),
        ({"tools": [FUNCTION] * 200}, "tools"),
        ({"tools": "f"}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools[1].function.name"),
        ({"tools": [FUNCTION]}, "tools"),  # this model has no way to write a call
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"include_reasoning": 1}, "include_reasoning"),
        ({"functions": []}, "functions"),
        (
            {"messages": [*USER, {"role": "assistant", "tool_calls": [CALLED]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"messages": [*USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALLED]}]}, "messages[0].tool_calls"),
    ],
)
def test_chat_fields(http: httpx.Client, extra: dict[str, Any], param: str) -> None:
    """Guards what only a conversation can have."""
    assert_error(http.post(CHAT, json={"messages": USER, **extra}), 400, param)


@pytest.mark.parametrize("name", ["../../x", "gpt-4", "", "tiny\n"])
def test_model(http: httpx.Client, name: str) -> None:
    """Guards against another model's name being taken for this one's, or for a path."""
    answer = http.post(COMPLETIONS, json={"model": name, "prompt": "x"})
    assert_error(answer, 404, "model")
    assert answer.json()["error"]["code"] == "model_not_found"


def test_kinds_of_content(http: httpx.Client) -> None:
    """Guards 415: form posts, nothing declared, compressed bodies (a bomb is never unpacked)."""
    body = json.dumps({"prompt": "x"}).encode()
    assert_error(http.post(COMPLETIONS, content=body), 415)
    assert_error(http.post(COMPLETIONS, data={"prompt": "x"}), 415)
    bomb = gzip.compress(b" " * 10_000_000)
    assert_error(http.post(COMPLETIONS, content=bomb, headers={**JSON, "content-encoding": "gzip"}), 415)


def test_large_body(http: httpx.Client) -> None:
    """Guards 413, declared and chunked."""
    assert_error(http.post(COMPLETIONS, content=b" " * (5 << 20), headers=JSON), 413)
    chunked = http.post(COMPLETIONS, content=(b" " * 65536 for _ in range(70)), headers=JSON)
    assert_error(chunked, 413)


def test_routes(http: httpx.Client) -> None:
    """Guards 404 and 405 against another shape, and the framework's own pages against being there."""
    for path in ("/web", "/web/", "/docs", "/redoc", "/v1", "/v1/", "/v1/completions/", "/x\u00e9"):
        assert_error(http.get(path), 404)
    assert_error(http.get("/v1/models/other"), 404, "model")
    answer = http.get(COMPLETIONS)
    assert_error(answer, 405)
    assert answer.headers["allow"] == "POST"
    assert_error(http.request("OPTIONS", COMPLETIONS, headers={"origin": "http://evil"}), 405)


def test_no_cross_origin(http: httpx.Client) -> None:
    """Guards CORS being off: no page of another origin may read an answer."""
    answer = http.get("/v1/models", headers={"origin": "http://evil"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("asked", "is_kept"), [("abc-1.2_X", True), ("a b", False), ("x" * 65, False), ("é", False)])
def test_request_id(http: httpx.Client, asked: str, is_kept: bool) -> None:
    """Guards the header that comes back: only what cannot do harm."""
    answer = http.get("/v1/models", headers={"x-request-id": asked.encode()})
    assert (answer.headers["x-request-id"] == asked) == is_kept


CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)
RAW: dict[str, tuple[bytes, bytes]] = {
    "no http": (b"\x00\x01\x02\r\n\r\n", b"400"),
    "no version": (b"GET /\r\n\r\n", b"400"),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", b"400"),
    "two lengths": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"400",
    ),
    "bad length": (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
    "bad chunk": (
        CHUNKED + b"zz\r\n",
        b"400",
    ),
    "crlf in id": (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\rb: c\r\n\r\n", b"400"),
    "long header": (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 100_000, b"400"),
    "upgrade": (
        b"GET /v1/x HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
        b"404",
    ),
    "pipelined": (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 2, b"200"),
    "a length that is too short": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n"
        b'{"prompt": "x"}',
        b"400",
    ),
    "100 MB": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 104857600\r\n"
        b"\r\n{",
        b"413",
    ),
    "a million pieces": (
        CHUNKED + b"1\r\n \r\n" * 20_000,
        b"400",
    ),
}


@pytest.mark.parametrize(("sent", "status"), RAW.values(), ids=RAW)
def test_raw(served: Any, http: httpx.Client, sent: bytes, status: bytes) -> None:
    """Guards the parser's own errors: in our shape, and the next client is served."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
        raw.sendall(sent)
        got = raw.recv(65536)
    assert got.startswith(b"HTTP/1.1 " + status), got
    assert b"application/json" in got
    assert http.get("/health").status_code == 200


def test_a_character_between_two_chunks(http: httpx.Client) -> None:
    """Guards UTF-8 that is cut by the transport: what comes in as a character never goes out as U+FFFD."""
    data = json.dumps({"prompt": "na\u00efve \u4f60\u597d", "max_tokens": 0, "echo": True}, ensure_ascii=False).encode()
    answer = http.post(COMPLETIONS, content=(data[at : at + 1] for at in range(len(data))), headers=JSON)
    assert answer.json()["choices"][0]["text"] == "na\u00efve \u4f60\u597d"


def test_a_regex_that_backtracks_elsewhere(http: httpx.Client) -> None:
    """Guards `(a+)+b`: no engine of ours backtracks, so it is answered like any other."""
    body = {"prompt": "x", "max_tokens": 8, "guided_regex": "(a+)+b"}
    assert set(http.post(COMPLETIONS, json=body).json()["choices"][0]["text"]) <= {"a", "b"}


@pytest.mark.parametrize("scheme", ["http", "file", "ftp"])
def test_nothing_is_fetched(http: httpx.Client, scheme: str) -> None:
    """Guards rule 6: no URL of a client leads to a connection, in a message or in a schema."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.setblocking(False)
        url = f"{scheme}://127.0.0.1:{door.getsockname()[1]}/x"
        part = {"type": "image_url", "image_url": {"url": url}}
        assert_error(http.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]}), 400, "messages")
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": url}}}
        answer = http.post(CHAT, json={"messages": USER, "response_format": schema})
        assert_error(answer, 400, "response_format.json_schema.schema.$ref")
        with pytest.raises(BlockingIOError):
            door.accept()


def test_raw_fuzz(served: Any, http: httpx.Client) -> None:
    """Guards the connection against bytes nobody thought of: an answer of ours or a closed connection, never a 5xx."""
    body = b'{"prompt": "x", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 32\r\n\r\n"
    draw = random.Random(5)
    for _ in range(150):
        sent = bytearray(head + body)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(sent))
            piece = draw.choice(
                [b"\r\n", b"\x00", b"\xff", b":", b" ", bytes([draw.randrange(256)]), sent[: draw.randrange(40)]]
            )
            sent[at : at + draw.choice([0, 1, 4])] = piece
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            got = b""
            while piece := raw.recv(65536):
                got += piece
        assert got[:10] in (b"", b"HTTP/1.1 4", b"HTTP/1.1 2"), bytes(sent)
    assert http.get("/health").status_code == 200
