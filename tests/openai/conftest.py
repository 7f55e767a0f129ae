"""A tiny model with a byte-level tokenizer and a chat template, served by the real server on a real socket."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from served_model import Served, assert_idle
from tokenizer_kinds import make_tokenizer

from dist_infer import LLM
from dist_infer.openai.keys import ApiKey
from dist_infer.serve_config import ServeLimits

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_REQUESTS = 4


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=640, num_hidden_layers=2), directory)
    make_tokenizer("byte-level", directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def run_config(checkpoint: Path, store_root: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"path": str(checkpoint)},
        "offload": {"store": str(store_root)},
        "engine": {
            "kv_memory": "1 MiB",
            "block_tokens": 4,
            "max_batch_tokens": 64,
            "max_requests": MAX_REQUESTS,
            "max_model_len": 240,
        },
        "cluster": {"device": "cpu"},
    }


@pytest.fixture(scope="session")
def llm(run_config: dict[str, Any]) -> Iterator[LLM]:
    with LLM(run_config) as made:
        yield made
        made.integrity()


@pytest.fixture
def serve(llm: LLM) -> Iterator[Callable[..., Served]]:
    """serve(keys=..., hosts=..., ready=True, formats={...}, **limits): a server of its own, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(
            *,
            keys: tuple[ApiKey, ...] = (),
            hosts: tuple[str, ...] = ("*",),
            ready: bool = True,
            formats: dict[str, Any] | None = None,
            **limits: Any,
        ) -> Served:
            made = Served(llm if ready else None, ServeLimits(**limits), keys, hosts, formats)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def slow_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of the engine takes 20 ms at least, so that LONG takes seconds on any machine."""
    executor, pause = llm.gang.executor, threading.Event()
    collect = executor.collect

    def slowly(timeout_s: float) -> Any:
        pause.wait(0.02)
        return collect(timeout_s)

    monkeypatch.setattr(executor, "collect", slowly)


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    made = Served(llm, ServeLimits())
    yield made
    made.close()
    assert_idle(llm)


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=20) as client:
        yield client


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made
