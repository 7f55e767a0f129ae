"""A tiny model in two stages whose layers are streamed from a store, served on a real socket."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from observed import KEYS, scrape_of, some_requests
from served_model import Served, assert_idle
from small_engine import run_config
from tokenizer_kinds import make_tokenizer

from dist_infer import LLM
from dist_infer.serve_config import ServeLimits

_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="session")
def streamed_config(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, store_root: Path
) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("observed") / "model"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=640, num_hidden_layers=10), directory)
    make_tokenizer("byte-level", directory)
    (directory / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    return run_config(directory, store_root, streamed=True, pipeline=2)


@pytest.fixture(scope="session")
def llm(streamed_config: dict[str, Any]) -> Iterator[LLM]:
    with LLM(streamed_config) as made:
        yield made


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    """With keys. Some requests have been answered and one was refused."""
    made = Served(llm, ServeLimits(), KEYS)
    some_requests(made)
    yield made
    made.close()
    assert_idle(llm)


@pytest.fixture(scope="module")
def scrape(served: Served) -> str:
    return scrape_of(served)
