"""One streamed request to an OpenAI endpoint, timed piece by piece as it comes in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2

from dist_infer.load.prompts import Question
from dist_infer.load.record import Record
from partition.errors import ClusterError, ConfigError

MAX_LINE_BYTES = 4 << 20
_MAX_DETAIL_BYTES = 2000
_CONNECT_TIMEOUT_S = 10.0
_DATA = b"data:"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go and what is in each beside the prompt. api_key is sent to this URL alone, and never shown."""

    url: str
    model: str
    api: Literal["chat", "completions"] = "chat"
    max_tokens: int = 128
    timeout_s: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)
    with_usage: bool = True

    def body(self, question: Question) -> bytes:
        content: dict[str, Any] = {"model": self.model, "max_tokens": self.max_tokens, "stream": True}
        if self.with_usage:
            content["stream_options"] = {"include_usage": True}
        if not isinstance(question, str):
            given = question.model_dump(exclude_none=True)
            content |= {key: given[key] for key in ("messages", "tools") if key in given}
        elif self.api == "chat":
            content["messages"] = [{"role": "user", "content": question}]
        else:
            content["prompt"] = question
        return json.dumps(content | self.extra).encode()

    @property
    def path(self) -> str:
        return f"{self.url}/{'chat/completions' if self.api == 'chat' else 'completions'}"


class _BadStreamError(Exception):
    """What came is no stream of an answer. args: the kind, then details."""


def make_client(api_key: str | None, timeout_s: float) -> httpx2.AsyncClient:
    """As many connections as there are requests; no proxy, no redirect: the server itself is measured."""
    headers = {"accept-encoding": "identity", "content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return httpx2.AsyncClient(
        headers=headers,
        timeout=httpx2.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
        follow_redirects=False,
    )


def base_url(url: str) -> str:
    """With `/v1` where no path was given. Raises ConfigError."""
    try:
        read = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{url!r} is no URL ({error}): write e.g. http://127.0.0.1:8000") from None
    if read.scheme not in ("http", "https") or not read.host or read.query or read.userinfo:
        raise ConfigError(f"{read.copy_with(userinfo=b'')} cannot be measured: write e.g. http://127.0.0.1:8000/v1")
    return str(read).rstrip("/") if read.path.strip("/") else f"{str(read).rstrip('/')}/v1"


async def first_model(client: httpx2.AsyncClient, url: str) -> str:
    """The first model that the endpoint lists. Raises ClusterError when it cannot be asked."""
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            answer = await client.get(f"{url}/models")
        if answer.status_code != 200:
            raise ClusterError(f"{url}/models answered {answer.status_code}: {answer.text[:300]}")
        return str(answer.json()["data"][0]["id"])
    except (httpx2.HTTPError, TimeoutError) as error:
        raise ClusterError(f"{url}/models cannot be read ({_named(error)}): is the server up?") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ClusterError(f"{url}/models lists no model: name one with --model") from error


async def send(
    client: httpx2.AsyncClient, target: Target, question: Question, record: Record, now: Callable[[], float]
) -> None:
    """Ask and fill in the record. Whatever goes wrong is in it; only cancellation is raised."""
    record.sent_s = now()
    try:
        async with (
            asyncio.timeout(target.timeout_s),
            client.stream("POST", target.path, content=target.body(question)) as response,
        ):
            if response.status_code != 200:
                raise _BadStreamError(f"HTTP {response.status_code}", await _begin_of(response))
            await _read(response, record, now)
    except TimeoutError:
        record.error = "timeout"
    except httpx2.TimeoutException as error:
        record.error, record.detail = "timeout", _named(error)
    except httpx2.ConnectError as error:
        record.error, record.detail = "connection refused", _named(error)
    except httpx2.HTTPError as error:
        record.error, record.detail = "connection broken", _named(error)
    except _BadStreamError as error:
        record.error, record.detail = error.args
    record.end_s = now()


async def _read(response: httpx2.Response, record: Record, now: Callable[[], float]) -> None:
    """Up to `[DONE]`. Only one line is in memory at a time."""
    is_done = False
    async for arrived_s, line in _lines(response, now):
        if not line.startswith(_DATA):
            continue  # a comment, an empty line, an event's name
        data = line[len(_DATA) :].strip()
        if data == b"[DONE]":
            is_done = True
            break
        try:
            _take(json.loads(data), arrived_s, record)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _BadStreamError("not understood", f"{_named(error)} in {data[:200]!r}") from None
    if not is_done:
        raise _BadStreamError("stream cut off", "it ended without [DONE]")
    if not record.chunk_s:
        raise _BadStreamError("empty answer", "")


def _take(chunk: dict[str, Any], arrived_s: float, record: Record) -> None:
    if chunk.get("error"):
        raise _BadStreamError("error in the stream", json.dumps(chunk["error"])[:_MAX_DETAIL_BYTES])
    if usage := chunk.get("usage"):
        record.num_prompt_tokens = int(usage["prompt_tokens"])
        record.num_output_tokens = int(usage["completion_tokens"])
    for choice in chunk["choices"]:
        delta = choice.get("delta") or {}
        texts = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
        if any(texts) or delta.get("tool_calls"):
            record.chunk_s.append(arrived_s)
        record.finish_reason = choice.get("finish_reason") or record.finish_reason


async def _lines(response: httpx2.Response, now: Callable[[], float]) -> AsyncIterator[tuple[float, bytes]]:
    """Each line with the time at which its end came."""
    rest = b""
    async for piece in response.aiter_bytes():
        arrived_s = now()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield arrived_s, line
        if len(rest) > MAX_LINE_BYTES:
            raise _BadStreamError("not understood", f"a line of more than {MAX_LINE_BYTES} bytes")


async def _begin_of(response: httpx2.Response) -> str:
    found = b""
    async for piece in response.aiter_bytes():
        found += piece
        if len(found) > _MAX_DETAIL_BYTES:
            break
    return found[:_MAX_DETAIL_BYTES].decode(errors="replace")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
