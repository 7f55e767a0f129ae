"""What a user does on the page, a server that says what a test wants, and a watch on what a page must not do."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import ConsoleMessage, Locator, Page, Route, expect
from served_model import wait_until

expect.set_options(timeout=15_000)


def prompt(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message", exact=True)


def ask(page: Page, text: str, **settings: str) -> None:
    """Type and press Enter; settings by their labels, with underscores for spaces."""
    for name, value in settings.items():
        page.get_by_label(name.replace("_", " ").capitalize(), exact=True).fill(value)
    prompt(page).fill(text)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    prompt(page).press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".message.assistant")


def text_of_answers(page: Page) -> Locator:
    return page.locator(".message.assistant > .markdown")


def wait_for_end(page: Page) -> None:
    expect(page.get_by_role("button", name="Regenerate the answer")).to_be_visible()


def script(page: Page, deltas: Sequence[dict[str, Any]], finish: str = "stop") -> list[dict[str, Any]]:
    """Every chat request gets these deltas as a stream; returns the requests' bodies as they come."""
    seen: list[dict[str, Any]] = []
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None} for delta in deltas
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}], "usage": None})
    usage = {"prompt_tokens": 7, "completion_tokens": len(deltas), "total_tokens": 7 + len(deltas)}
    chunks.append({"choices": [], "usage": usage})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def answer(route: Route) -> None:
        seen.append(route.request.post_data_json)
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    return seen


def texts(*pieces: str) -> list[dict[str, Any]]:
    return [{"content": piece} for piece in pieces]


def wait_for_requests(page: Page, sent: Sequence[Any], number: int) -> None:
    """Until a script has seen so many; the page goes on meanwhile."""
    wait_until(lambda: page.wait_for_timeout(10) is None and len(sent) == number)


@dataclass
class Watch:
    """What a page must not do. expected: patterns of console errors that belong to the test."""

    origins: set[str] = field(default_factory=set)
    expected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def add(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._request(request.url))

    def check(self) -> None:
        unexpected = [error for error in self.errors if not any(re.search(each, error) for each in self.expected)]
        assert unexpected == []
        assert self.elsewhere == []

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _request(self, url: str) -> None:
        if not url.startswith(tuple(self.origins)) and not url.startswith("data:"):
            self.elsewhere.append(url)
