"""A tiny model that can be served and that answers prompts, and run files for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from named_runs import Shell, WriteRun
from tokenizer_kinds import make_tokenizer


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "model"
    shutil.copytree(
        tiny_checkpoint("llama", vocab_size=640, num_hidden_layers=2, max_position_embeddings=16384), directory
    )
    make_tokenizer("byte-level", directory)
    return directory


@pytest.fixture(scope="session")
def write_run(model: Path, store_root: Path) -> WriteRun:
    """write_run(directory, section={key: value}): a run file named `tiny`; without `run` it serves on any free port."""

    def write(directory: Path, **sections: dict[str, object]) -> Path:
        config: dict[str, dict[str, object] | str] = {
            "name": "tiny",
            "model": {"path": str(model)},
            "offload": {"store": str(store_root)},
            "engine": {"kv_memory": "1 MiB", "block_tokens": 4, "max_requests": 4, "max_model_len": 240},
            "cluster": {"device": "cpu"},
            "run": {"kind": "serve", "port": 0, "limits": {"drain_time": 20}},
        }
        for name, section in sections.items():
            old = config.get(name, {})
            config[name] = section if name == "run" or isinstance(old, str) else {**old, **section}
        file = directory / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    return write


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made.close()
