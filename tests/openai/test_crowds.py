"""Clients that leave at every moment, more of them than can be served, and what one must never see of another."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from served_model import Served, assert_idle, raw_post, wait_until

from dist_infer import LLM
from dist_infer.serve_config import ServeLimits

LONG: dict[str, Any] = {"prompt": "the sea", "max_tokens": 220, "ignore_eos": True, "temperature": 0, "stream": True}


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("phase", ["queue", "prefill", "first byte", "decode"])
def test_leaving_at_every_moment(serve: Callable[..., Any], llm: LLM, phase: str) -> None:
    """T22: whoever leaves gives back what it has; its neighbour's answer is the one it gets alone."""
    served = serve()
    url = f"{served.url}/v1/completions"
    body = {"prompt": "a ship", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    alone = httpx.post(url, json=body, timeout=30).json()["choices"][0]["text"]
    answers: list[str] = []
    neighbour = threading.Thread(
        target=lambda: answers.append(httpx.post(url, json=body, timeout=60).json()["choices"][0]["text"])
    )
    neighbour.start()
    wait_until(lambda: llm.stats.num_running == 1 and not served.service.num_waiting_tokens)
    crowd = []
    if phase == "queue":
        for number in range(2, llm.plan.max_requests + 1):
            crowd.append(raw_post(served.port, LONG))
            wait_until(lambda number=number: llm.stats.num_running == number)
    before = llm.stats.num_aborted
    long_prompt = {**LONG, "prompt": [5 + at % 90 for at in range(200)], "max_tokens": 20}  # four steps of 64 tokens
    leaving = raw_post(served.port, long_prompt if phase == "prefill" else LONG)
    if phase == "queue":
        wait_until(lambda: llm.stats.num_waiting == 1)
    elif phase == "prefill":
        wait_until(lambda: llm.stats.num_running == 2 and served.service.num_waiting_tokens == 200)
    elif phase == "first byte":
        wait_until(lambda: served.service.num_open == 2)
    else:
        assert b"data:" in leaving.recv(4096) + leaving.recv(4096)
    leaving.close()
    wait_until(lambda: served.service.num_open == 1 + len(crowd))
    wait_until(lambda: llm.stats.num_waiting == 0 and llm.stats.num_running == 1 + len(crowd))
    for found in crowd:
        found.close()
    neighbour.join(30)
    assert answers == [alone]
    wait_until(lambda: served.service.num_open == 0)
    assert_idle(llm)
    # one that left before its prompt was read never came to the engine
    assert llm.stats.num_aborted - before in ({0, 1} if phase == "first byte" else {1 + len(crowd)})


@pytest.mark.usefixtures("slow_steps")
def test_overload(serve: Callable[..., Any], llm: LLM) -> None:
    """T24, in short: several times what fits for three seconds: all that is taken is finished, the rest told when."""
    served = serve(max_queued_requests=4)
    body = {"prompt": "x", "max_tokens": 5, "ignore_eos": True}

    async def load() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=served.url, timeout=30, limits=limits) as http:
            sent = []
            for _ in range(300):  # 100 a second; four at once take 0.1 s and more
                sent.append(asyncio.ensure_future(http.post("/v1/completions", json=body)))
                await asyncio.sleep(0.01)
            return await asyncio.gather(*sent)

    answers = asyncio.run(load())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 5
        else:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
    assert statuses.count(200) >= 8
    wait_until(lambda: served.service.num_open == 0)
    assert_idle(llm)


def test_a_crowd_of_half_requests(serve: Callable[..., Any]) -> None:
    """Guards against slowloris by many: all are closed at the limits, and those who ask are answered meanwhile."""
    served = serve(header_time=1.0, body_time=1.0, idle_time=1.0, max_connections=400)
    half_body = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    half_head = b"GET /health HTTP/1.1\r\nHost: x\r\nA: "
    crowd = []
    for sent in (half_head, half_body, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        for _ in range(100):
            found = socket.create_connection(("127.0.0.1", served.port), timeout=10)
            found.sendall(sent)
            crowd.append(found)
    assert httpx.post(f"{served.url}/tokenize", json={"prompt": "x"}, timeout=20).status_code == 200
    wait_until(lambda: len(served.server._server.server_state.connections) == 0, 20)
    for found in crowd:
        while found.recv(65536):
            continue
        found.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_answer_has_another_s_secret(run_config: dict[str, Any]) -> None:
    """T36: TP2×PP2, every prompt with a secret of its own, some leave at random: the others' answers are what each gets
    alone, and hold nobody else's."""
    config = {**run_config, "parallel": {"tensor": 2, "pipeline": 2}}
    secrets = [f"{number:03d}{random.Random(number).randrange(10**9):09d}" for number in range(12)]
    bodies = [
        {"prompt": f"secret {secret}:", "max_tokens": 16, "temperature": 0, "ignore_eos": True, "echo": True}
        for secret in secrets
    ]
    with LLM(config) as llm:
        served = Served(llm, ServeLimits(max_queued_requests=64))
        try:
            url = f"{served.url}/v1/completions"

            async def ask(http: httpx.AsyncClient, index: int, leaves_after: int | None) -> str | None:
                text, num_chunks = "", 0
                async with http.stream("POST", url, json={**bodies[index], "stream": True}) as answer:
                    async for line in answer.aiter_lines():
                        if leaves_after is not None and num_chunks >= leaves_after:
                            return None
                        if line.startswith("data: {"):
                            num_chunks += 1
                            text += json.loads(line[6:])["choices"][0]["text"]
                return text

            async def crowd() -> list[str | None]:
                draw = random.Random(3)
                leaving = [draw.choice([None, None, draw.randrange(8)]) for _ in bodies]
                async with httpx.AsyncClient(timeout=120) as http:
                    return await asyncio.gather(*(ask(http, index, left) for index, left in enumerate(leaving)))

            with httpx.Client(timeout=60) as http:
                alone = [http.post(url, json=body).json()["choices"][0]["text"] for body in bodies]
            together = asyncio.run(crowd())
            assert 0 < together.count(None) < len(bodies)
            for index, text in enumerate(together):
                if text is None:
                    continue
                assert text == alone[index]
                assert [secret for secret in secrets if secret in text] == [secrets[index]]
            wait_until(lambda: served.service.num_open == 0)
            assert_idle(llm)
        finally:
            served.close()
        llm.integrity()
