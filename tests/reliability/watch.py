"""When a run was ready and when it was not, as a balancer's probes would see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import httpx

_EVERY_S = 0.1


class ReadyWatch:
    """`with ReadyWatch(url) as watch:` asks ten times a second. enter: called in the thread that connects."""

    def __init__(self, url: str, enter: Callable[[], None] = lambda: None) -> None:
        self._url, self._enter = f"{url}/health/ready", enter
        self._changes: list[tuple[float, bool]] = []  # when it became so
        self._news = threading.Condition()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> ReadyWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(20)

    def until(self, is_ready: bool, since_s: float, timeout_s: float) -> float:
        """When it was so for the first time after `since_s`, of the monotonic clock; AssertionError at the deadline."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while (found := self._first(is_ready, since_s)) is None:
                left = deadline - time.monotonic()
                assert left > 0, f"not {'ready' if is_ready else 'noticed'} within {timeout_s:g} s"
                self._news.wait(left)
        return found

    def _first(self, is_ready: bool, since_s: float) -> float | None:
        return next((at_s for at_s, found in self._changes if found == is_ready and at_s > since_s), None)

    def _run(self) -> None:
        self._enter()
        limits = httpx.Limits(max_keepalive_connections=0)
        last: bool | None = None
        with httpx.Client(timeout=5, limits=limits, trust_env=False) as http:
            while not self._is_over.wait(_EVERY_S):
                try:
                    found = http.get(self._url).status_code == 200
                except httpx.HTTPError:
                    found = False
                if found != last:
                    last = found
                    with self._news:
                        self._changes.append((time.monotonic(), found))
                        self._news.notify_all()
