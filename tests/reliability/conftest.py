"""A tiny float32 model, what it answers undisturbed, and runs of it that serve: TP2×PP2, partly streamed."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reliability.clients import Question
from reliability.figures import IS_WHOLE
from reliability.injections import Clock
from reliability.system import System
from tokenizer_kinds import make_tokenizer

from dist_infer import LLM, SamplingParams
from dist_infer.backend import make_backend
from dist_infer.config import load_config
from dist_infer.startup import open_model, plan_run

NUM_QUESTIONS = 17  # not a multiple of the number of clients: each asks all of them
BLOCK_TOKENS = 4
_NUM_LAYERS = 12


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What other tests cover in short, or what takes a minute, is for `make reliability`."""
    if not IS_WHOLE:
        left_out = [item for item in items if item.get_closest_marker("whole") is not None]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reliability") / "model"
    shutil.copytree(
        tiny_checkpoint("llama", vocab_size=640, num_hidden_layers=_NUM_LAYERS, intermediate_size=384), directory
    )
    make_tokenizer("byte-level", directory)
    return directory


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of its own, to be damaged."""
    return tmp_path_factory.mktemp("reliability-stores")


@pytest.fixture(scope="session")
def config(model: Path, store: Path) -> dict[str, Any]:
    """Of a run; the KV cache holds three of the longest sequences, and not all clients' at once."""
    return {
        "name": "tiny",
        "model": {"path": str(model), "dtype": "float32"},
        "parallel": {"tensor": 2, "pipeline": 2},
        # strace sees preadv, not io_submit
        "offload": {"store": str(store), "verify": "always", "reader": "threads", "slots": 2},
        "engine": {
            "kv_memory": "384 KiB",
            "block_tokens": BLOCK_TOKENS,
            "max_batch_tokens": 32,
            "max_requests": 12,
            "max_model_len": 240,
        },
        "cluster": {"device": "cpu", "max_restarts": 10_000},
        "run": {"kind": "serve", "limits": {"drain_time": 20}},
    }


@pytest.fixture(scope="session")
def streamed(config: dict[str, Any]) -> dict[str, Any]:
    """The same with memory for some of the layers."""
    loaded = load_config(config)
    backend = make_backend(loaded.cluster, loaded.name)
    facts = backend.facts(with_devices=False, sample=None, dtype=None)
    plan = plan_run(loaded, open_model(loaded), facts, backend.footprint(2, 2))
    backend.close()
    layers = sum(3 * rank.units[1].num_bytes // 2 for rank in plan.ranks)
    return {**config, "offload": {**config["offload"], "host_memory": plan.budgets[0].used_bytes - layers}}


@pytest.fixture(scope="session")
def questions(config: dict[str, Any]) -> list[Question]:
    """Each with a secret of its own, which is part of its answer; answered by one process that nothing disturbs."""
    prompts = [f"secret {1_000_003 * number + 12_345}: the sea" for number in range(NUM_QUESTIONS)]
    lengths = [24 + 5 * (number % 7) for number in range(NUM_QUESTIONS)]
    with LLM({**config, "parallel": {}, "engine": {**config["engine"], "kv_memory": "8 MiB"}}) as llm:
        params = [SamplingParams(max_tokens=length, temperature=0, ignore_eos=True) for length in lengths]
        outputs = llm.generate(prompts, params)
    return [
        Question(
            {"prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, "echo": True},
            prompt + output.outputs[0].text,
        )
        for prompt, length, output in zip(prompts, lengths, outputs, strict=True)
    ]


@pytest.fixture(scope="session")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    """A library that puts one process's clock ahead, and the file that says whose."""
    directory = tmp_path_factory.mktemp("clock")
    library, file = directory / "clock_skew.so", directory / "skew"
    source = Path(__file__).parent / "clock_skew.c"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    file.write_bytes(struct.pack("iI", 0, 0))
    return Clock(library, file)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, questions: list[Question]) -> Iterator[Callable[..., System]]:
    """launch(config, environment={}): a run that is ready; what is left of it is killed at the end of the module."""
    with contextlib.ExitStack() as stack:

        def start(config: dict[str, Any], environment: dict[str, str] | None = None) -> System:
            system = System(tmp_path_factory.mktemp("system"), config, questions)
            stack.callback(system.shell.close)
            system.launch(environment)
            return system

        yield start
