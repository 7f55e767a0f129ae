"""Clients that stall, leave or come in crowds: each is ended at its limit, and nobody else notices."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from served_model import assert_idle, raw_post, wait_until

from dist_infer import LLM
from dist_infer.openai.guard import ACCESS_LOG

LONG = {"prompt": "the sea", "max_tokens": 220, "ignore_eos": True, "temperature": 0}


def closed_after(found: socket.socket) -> bytes:
    """What was still sent; TimeoutError when it is not closed."""
    got = b""
    while True:
        try:
            piece = found.recv(65536)
        except ConnectionError:
            return got
        if not piece:
            return got
        got += piece


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nA: b"], ids=["nothing", "half a head"])
def test_slow_headers(serve: Callable[..., Any], sent: bytes) -> None:
    """Guards against slowloris: a connection without a whole head is closed at header_time."""
    served = serve(header_time=0.3)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
        raw.sendall(sent)
        assert closed_after(raw).startswith(b"HTTP/1.1 408")


def test_second_head_is_timed_too(serve: Callable[..., Any]) -> None:
    """Guards keep-alive connections: uvicorn's own timer ends with the first byte of the next request."""
    served = serve(header_time=0.3, idle_time=60)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        raw.sendall(b"GET /hea")
        assert b"408" in closed_after(raw)


def test_idle_connection(serve: Callable[..., Any]) -> None:
    """Guards idle_time."""
    served = serve(idle_time=1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert closed_after(raw).startswith(b"HTTP/1.1 200")


def test_slow_body(serve: Callable[..., Any]) -> None:
    """Guards body_time, also against a client that drips bytes."""
    served = serve(body_time=0.4)
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
        raw.sendall(head)
        assert raw.recv(65536).startswith(b"HTTP/1.1 408")


def test_too_many_connections(serve: Callable[..., Any]) -> None:
    """Guards max_connections: the one too many is told so, and places come back."""
    served = serve(max_connections=2)
    open_ones = [socket.create_connection(("127.0.0.1", served.port), timeout=10) for _ in range(2)]
    wait_until(lambda: len(served.server._server.server_state.connections) == 2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
        assert closed_after(raw).startswith(b"HTTP/1.1 503")
    for found in open_ones:
        found.close()
    wait_until(lambda: not served.server._server.server_state.connections)
    assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_blocks(serve: Callable[..., Any], llm: LLM, stream: bool) -> None:
    """T22: a client that leaves mid-answer, or in the queue, gives its blocks back; one that stays is answered."""
    served = serve()
    leaving = [raw_post(served.port, {**LONG, "stream": stream, "n": 2}) for _ in range(4)]
    wait_until(lambda: llm.stats.num_running > 0)
    assert served.service.num_open == 8
    before = llm.stats.num_aborted
    for found in leaving:
        found.close()
    wait_until(lambda: served.service.num_open == 0)
    assert_idle(llm)
    assert llm.stats.num_aborted == before + 4
    assert httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"}, timeout=20).status_code == 200


def test_stalled_reader_is_cut_off(serve: Callable[..., Any], llm: LLM) -> None:
    """T23: a client that reads nothing holds its answer for write_time at most."""
    served = serve(write_time=0.5)
    body = {**LONG, "stream": True, "n": 4, "logprobs": 20, "prompt": ["the sea"] * 4}
    with raw_post(served.port, body) as raw:
        wait_until(lambda: served.service.num_open == 16)
        wait_until(lambda: served.service.num_open == 0, 120)  # first the buffers of both sockets have to fill
        wait_until(lambda: not served.server._server.server_state.connections)
        assert b"[DONE]" not in closed_after(raw)
    assert_idle(llm)


@pytest.mark.usefixtures("slow_steps")
def test_full_queue_is_refused_at_once(serve: Callable[..., Any], llm: LLM) -> None:
    """T24: 429 with Retry-After, without the engine or the tokenizer having been asked; then places come back."""
    served = serve(max_queued_requests=2)
    submitted = llm._loop._num_submitted + 6
    waiting = [raw_post(served.port, {**LONG, "stream": True}) for _ in range(6)]
    wait_until(lambda: llm._loop._num_submitted == submitted)
    assert served.service.num_open == 6
    answers = [httpx.post(f"{served.url}/v1/completions", json=LONG) for _ in range(5)]
    assert {answer.status_code for answer in answers} == {429}
    assert {answer.json()["error"]["code"] for answer in answers} == {"queue_full"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert min(answer.elapsed.total_seconds() for answer in answers) < 0.05
    unread = httpx.post(f"{served.url}/v1/completions", json={"no such field": 1})
    assert unread.status_code == 429  # a crowd's bodies are not looked at
    assert llm._loop._num_submitted == submitted
    for found in waiting:
        found.close()
    wait_until(lambda: served.service.num_open == 0)
    assert httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"}, timeout=20).status_code == 200


@pytest.mark.usefixtures("slow_steps")
def test_queued_tokens(serve: Callable[..., Any], llm: LLM) -> None:
    """Guards max_queued_tokens: a prompt counts until its first token, and one that waits alone always may."""
    served = serve(max_queued_tokens=1)
    running = []
    for number in range(1, llm.plan.max_requests + 1):  # one after the other: none of them waits beside another
        running.append(raw_post(served.port, {**LONG, "stream": True}))
        wait_until(lambda number=number: llm.stats.num_running == number and not served.service.num_waiting_tokens)
    running.append(raw_post(served.port, LONG))
    wait_until(lambda: served.service.num_waiting_tokens > 0)
    answer = httpx.post(f"{served.url}/v1/completions", json=LONG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    for found in running:
        found.close()
    wait_until(lambda: served.service.num_open == 0)
    assert served.service.num_waiting_tokens == 0
    assert_idle(llm)


@pytest.mark.usefixtures("slow_steps")
def test_deadlines(serve: Callable[..., Any], llm: LLM) -> None:
    """Guards request_time: 504 before the first byte, an error and [DONE] after it; blocks are free again."""
    served = serve(request_time=0.7, queue_time=0.7)
    whole = httpx.post(f"{served.url}/v1/completions", json=LONG)
    assert whole.status_code == 504
    assert whole.json()["error"]["type"] == "timeout_error"
    streamed = httpx.post(f"{served.url}/v1/completions", json={**LONG, "stream": True})
    assert streamed.status_code == 200
    assert "deadline" in streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert_idle(llm)


@pytest.mark.usefixtures("slow_steps")
def test_drain(serve: Callable[..., Any], llm: LLM) -> None:
    """T29: what runs finishes, what comes is refused with 503, probes say so."""
    served = serve()
    answers: list[httpx.Response] = []
    body = {**LONG, "stream": True}
    running = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{served.url}/v1/completions", json=body, timeout=30))
    )
    running.start()
    wait_until(lambda: served.service.num_open == 1)
    drained: list[bool] = []
    draining = threading.Thread(target=lambda: drained.append(served.run(served.service.drain(15))))
    draining.start()
    wait_until(lambda: httpx.get(f"{served.url}/health/ready").status_code == 503)
    refused = httpx.post(f"{served.url}/v1/completions", json=LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert httpx.get(f"{served.url}/health/live").status_code == 200
    running.join(20)
    draining.join(20)
    assert drained == [True]
    assert answers[0].text.endswith("data: [DONE]\n\n")
    assert "error" not in answers[0].text


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("drain_s", [0.0, 0.3])
def test_drain_that_ends_early(serve: Callable[..., Any], llm: LLM, drain_s: float) -> None:
    """T29: a generation longer than the drain, and any with a drain of 0, ends with an explicit error."""
    served = serve()
    with raw_post(served.port, {**LONG, "stream": True, "n": 4}) as raw:
        assert raw.recv(1024).startswith(b"HTTP/1.1 200")
        assert served.run(served.service.drain(drain_s)) is False
        wait_until(lambda: served.service.num_open == 0)
        got = b""
        while b"[DONE]" not in got:
            got += raw.recv(65536)
    assert b'"code": "draining"' in got
    assert_idle(llm)


def test_loading(serve: Callable[..., Any]) -> None:
    """Guards the time before the model is there: 503 with the phase, alive nevertheless."""
    served = serve(ready=False)
    served.service.note_progress("packing", 3, 7)
    answer = httpx.post(f"{served.url}/v1/completions", json=LONG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
    assert answer.headers["retry-after"]
    startup = httpx.get(f"{served.url}/health/startup")
    assert (startup.status_code, startup.json()) == (
        503, {"status": "loading", "phase": "packing", "done": 3, "total": 7},
    )  # fmt: skip
    assert httpx.get(f"{served.url}/health/live").status_code == 200


def test_access_log_has_no_prompt(serve: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """Guards prompts, answers and keys against the log."""
    served = serve()
    with caplog.at_level(logging.INFO, logger=ACCESS_LOG.name):
        body = {"prompt": "a secret", "user": "u1", "max_tokens": 4, "ignore_eos": True}
        httpx.post(f"{served.url}/v1/completions", json=body, headers={"x-request-id": "r1"}, timeout=20)
        wait_until(lambda: bool(caplog.records))
    (line,) = [json.loads(record.getMessage()) for record in caplog.records if record.name == ACCESS_LOG.name]
    assert (line["status"], line["request_id"], line["user"], line["output_tokens"]) == (200, "r1", "u1", 4)
    assert "secret" not in json.dumps(line)


def test_a_bug_is_one_request_s(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards 500: an error nobody foresaw says nothing of itself, and the next request is served."""
    served = serve()
    with monkeypatch.context() as patch:
        patch.setattr(served.service, "in_thread", lambda *_: 1 / 0)
        answer = httpx.post(f"{served.url}/v1/completions", json=LONG)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "internal_error"
    assert "division" not in answer.text
    started_s = time.monotonic()
    assert httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"}, timeout=20).status_code == 200
    assert time.monotonic() - started_s < 20
