"""The page in Debian's Chromium against the real server with a tiny model; Chromium is started once a module.

Every page is watched: an error in its console that a test does not expect, or a request to another origin, fails it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from served_model import Served, assert_idle
from tokenizer_kinds import make_tokenizer
from web_chat import Watch

from dist_infer import LLM
from dist_infer.openai.keys import ApiKey
from dist_infer.serve_config import ServeLimits

CHROMIUM = "/usr/bin/chromium"
TIMEOUT_MS = 15_000
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_MODEL_LEN = 4000  # long enough to stop an answer in its middle


@pytest.fixture(scope="session")
def llm(
    tiny_checkpoint: Callable[..., Path], store_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """Two stages that stream, so that the machine room has something to draw."""
    directory = tmp_path_factory.mktemp("web") / "model"
    made = tiny_checkpoint("llama", vocab_size=640, num_hidden_layers=4, max_position_embeddings=MAX_MODEL_LEN)
    shutil.copytree(made, directory)
    make_tokenizer("byte-level", directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = {
        "name": "tiny",
        "model": {"path": str(directory)},
        "offload": {"store": str(store_root)},
        "parallel": {"pipeline": 2},
        "engine": {
            "kv_memory": "4 MiB",
            "block_tokens": 16,
            "max_batch_tokens": 256,
            "max_requests": 4,
            "max_model_len": MAX_MODEL_LEN,
        },
        "cluster": {"device": "cpu"},
    }
    with LLM(config) as found:
        yield found
        found.integrity()


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[..., Served]]:
    """serve(keys=..., ready=True): a server of its own, closed at the end; the model is started when it is needed."""
    with contextlib.ExitStack() as stack:

        def make(*, keys: tuple[ApiKey, ...] = (), ready: bool = True) -> Served:
            made = Served(request.getfixturevalue("llm") if ready else None, ServeLimits(), keys)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    made = Served(llm, ServeLimits())
    yield made
    made.close()
    assert_idle(llm)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of a module: while it lives its event loop runs in the main thread, which async tests elsewhere cannot share."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture
def watch() -> Iterator[Watch]:
    found = Watch()
    yield found
    found.check()


@pytest.fixture
def open_page(browser: Browser, watch: Watch) -> Iterator[Callable[..., Page]]:
    """open_page(url, view="chat", **options of a browser context): a page in a fresh profile."""
    contexts: list[BrowserContext] = []

    def make(url: str, view: str = "chat", **options: Any) -> Page:
        context = browser.new_context(reduced_motion="reduce", **options)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        watch.origins.add(f"{url}/")
        watch.add(page)
        page.goto(f"{url}/#{view}")
        return page

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page: Callable[..., Page], served: Served) -> Page:
    """The chat, ready."""
    return open_page(served.url)
