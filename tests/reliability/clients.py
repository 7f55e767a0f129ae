"""Clients that ask without pause, each as soon as it has its answer, and what became of every request."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

NUM_STREAMING, NUM_WHOLE = 12, 4
LOST_S = 120.0  # a request without an end for so long is lost
_AGAIN_S = 0.2  # before asking again where nobody listens
_LONGEST_AGAIN_S = 5.0  # where one was told to come later, whatever one was told

End = Literal["answered", "left", "errored", "cut", "lost", "wrong"]


@dataclass(frozen=True)
class Question:
    """A body of /v1/completions, and the text that is its answer when nothing disturbs it."""

    body: dict[str, Any]
    answer: str


@dataclass(kw_only=True)
class Asked:
    """One request that was sent. detail: what was wrong with it, or which error it got."""

    index: int
    streams: bool
    sent_s: float
    text: str = ""
    end: End | None = None
    end_s: float = 0.0
    detail: str = ""
    was_sent: bool = True  # else nobody listened


class _CutError(Exception):
    """The connection ended before the answer did."""


class Clients:
    """`with Clients(url, questions) as clients:` they ask until `finish`, which waits for what is under way.

    Each asks question after question, starting at another one. A connection is for one request: where nobody listens,
    none was sent. rate_per_s: so many are sent instead, at random moments, however many are open (a quarter not
    streaming). leave_every: of so many streams one is left after its third chunk (0: none). enter: called in the thread
    that connects, before it does.
    """

    def __init__(
        self,
        url: str,
        questions: Sequence[Question],
        *,
        num_streaming: int = NUM_STREAMING,
        num_whole: int = NUM_WHOLE,
        rate_per_s: float = 0.0,
        leave_every: int = 0,
        seed: int = 0,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        self._url, self._questions = f"{url}/v1/completions", questions
        self._kinds = [True] * num_streaming + [False] * num_whole
        self._rate_per_s, self._leave_every, self._enter = rate_per_s, leave_every, enter
        self._draw = random.Random(seed)
        self._is_over = threading.Event()
        self._open: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="clients")
        self.asked: list[Asked] = []

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(LOST_S + 20)

    @property
    def num_in_flight(self) -> int:
        return len(self._open)

    @property
    def num_busy(self) -> int:
        """Streams of which something has come and not all."""
        asked = self.asked
        return sum(bool(asked[at].text) for at in list(self._open))

    def num_answered_since(self, at_s: float) -> int:
        """Of those that were sent after that."""
        return sum(asked.end == "answered" and asked.sent_s > at_s for asked in list(self.asked))

    def finish(self) -> list[Asked]:
        """No more are sent; all that was, with its end."""
        self._is_over.set()
        self._thread.join(LOST_S + 20)
        assert not self._thread.is_alive(), "a client did not come to an end"
        assert all(asked.end is not None for asked in self.asked)
        return self.asked

    def _run(self) -> None:
        self._enter()
        asyncio.run(self._all())

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=LOST_S, limits=limits, trust_env=False) as http:
            if self._rate_per_s:
                await self._open_loop(http)
            else:
                await asyncio.gather(*(self._closed_loop(http, at, kind) for at, kind in enumerate(self._kinds)))

    async def _open_loop(self, http: httpx.AsyncClient) -> None:
        async with asyncio.TaskGroup() as tasks:
            number = 0
            while not self._is_over.is_set():
                tasks.create_task(self._one(http, number, number % 4 != 3))
                number += 1
                await asyncio.sleep(self._draw.expovariate(self._rate_per_s))

    async def _closed_loop(self, http: httpx.AsyncClient, at: int, streams: bool) -> None:
        while not self._is_over.is_set():
            await asyncio.sleep(await self._one(http, at, streams))
            at += len(self._kinds)  # another question each time; all of them, where that does not divide them

    async def _one(self, http: httpx.AsyncClient, number: int, streams: bool) -> float:
        """Ask once. Seconds to wait before asking again."""
        asked = Asked(index=number % len(self._questions), streams=streams, sent_s=time.monotonic())
        place, leaves = len(self.asked), bool(self._leave_every) and number % self._leave_every == 0
        self.asked.append(asked)
        self._open.add(place)
        again_s = 0.0
        try:
            async with asyncio.timeout(LOST_S):
                again_s = await self._ask(http, asked, leaves=leaves)
        except httpx.ConnectError:
            asked.end, asked.was_sent, again_s = "cut", False, _AGAIN_S
        except (TimeoutError, httpx.TimeoutException):
            asked.end = "lost"
        except (_CutError, httpx.HTTPError) as error:
            asked.end, asked.detail = "cut", f"{type(error).__name__}: {error}"
        asked.end_s = time.monotonic()
        self._open.discard(place)
        return again_s

    async def _ask(self, http: httpx.AsyncClient, asked: Asked, *, leaves: bool) -> float:
        body = {**self._questions[asked.index].body, "stream": asked.streams}
        async with http.stream("POST", self._url, json=body) as response:
            if response.status_code != 200:
                self._judge(asked, (await response.aread()).decode(errors="replace"))
                return min(_LONGEST_AGAIN_S, float(response.headers.get("retry-after", 0)))
            if asked.streams:
                await self._read(response, asked, leaves=leaves)
            else:
                asked.text = json.loads(await response.aread())["choices"][0]["text"]
                self._compare(asked)
        return 0.0

    async def _read(self, response: httpx.Response, asked: Asked, *, leaves: bool) -> None:
        num_chunks = 0
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                if asked.end is None:
                    self._compare(asked)
                return
            if not line.startswith("data: "):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                self._judge(asked, line[6:])
                continue
            asked.text += "".join(choice["text"] for choice in chunk["choices"])
            num_chunks += 1
            if leaves and num_chunks == 3:
                is_right = self._questions[asked.index].answer.startswith(asked.text)
                asked.end, asked.detail = ("left", "") if is_right else ("wrong", repr(asked.text))
                return
        raise _CutError("it ended without [DONE]")

    def _compare(self, asked: Asked) -> None:
        expected = self._questions[asked.index].answer
        asked.end = "answered" if asked.text == expected else "wrong"
        if asked.end == "wrong":
            asked.detail = f"{asked.text!r} instead of {expected!r}"

    def _judge(self, asked: Asked, error: str) -> None:
        """An error must be one, in the shape that is promised; what came before it is the beginning of the answer."""
        asked.end, asked.detail = "errored", error
        if (fault := shape_fault(error)) or not self._questions[asked.index].answer.startswith(asked.text):
            asked.end, asked.detail = "wrong", f"{fault or asked.text!r}: {error}"


def shape_fault(text: str) -> str:
    """What is wrong with an error's body; empty: nothing. Clients see no traces, paths or places."""
    try:
        error = json.loads(text)["error"]
        keys = set(error)
    except (ValueError, TypeError, KeyError):
        return "no error object"
    if keys != {"message", "type", "param", "code"}:
        return f"an error with {sorted(keys)}"
    told = [secret for secret in ("Traceback", "/tmp/", ".py", "127.0.0.1:", "pid ") if secret in text]
    return f"an error that tells of {told}" if told else ""
