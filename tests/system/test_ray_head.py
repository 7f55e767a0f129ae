"""FAULTS T32: Ray's own processes killed under requests. A Ray that was started for the run is started again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from named_runs import Shell, read_until
from request_crowd import Crowd, run_config
from served_model import wait_until
from tokenizer_kinds import make_tokenizer

from dist_infer import LLM
from dist_infer.gang_state import Ready

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", vocab_size=640)


@pytest.fixture(scope="module")
def two(model: Path, store_root: Path) -> Iterator[LLM]:
    """Two stages."""
    config = run_config(model, store_root, parallel={"pipeline": 2}, cluster={"device": "cpu", "executor": "ray"})
    with LLM(config) as llm:
        yield llm


@pytest.fixture(scope="module")
def undisturbed(two: LLM) -> list[list[int]]:
    return Crowd(two).tokens()


def process_of_ray(name: str) -> psutil.Process:
    (found,) = [child for child in psutil.Process().children() if child.name() == name]
    return found


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_process_of_ray_that_is_killed_is_a_pause(two: LLM, undisturbed: list[list[int]], name: str) -> None:
    """T32. Ranks go on without a head and their requests with them, but nothing could replace one."""
    restarts, before = two.stats.num_gang_restarts, [report.pid for report in two.worker_reports]
    victim = process_of_ray(name)
    crowd = Crowd(two)
    assert crowd.has_begun.wait(60)
    victim.send_signal(signal.SIGKILL)
    assert crowd.tokens() == undisturbed
    wait_until(lambda: two.stats.num_gang_restarts == restarts + 1 and isinstance(two.state, Ready), 120)
    assert process_of_ray(name).pid != victim.pid
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before), 20)
    assert Crowd(two).tokens() == undisturbed
    two.integrity()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made.close()


def test_a_run_that_serves_finishes_what_is_open_and_starts_all_again(
    model: Path, store_root: Path, tmp_path: Path, shell: Shell
) -> None:
    """T32: the answer that is being streamed comes whole; after a while the same question has the same answer."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    make_tokenizer("byte-level", copy)
    config = run_config(copy, store_root, cluster={"device": "cpu"}, run={"kind": "serve", "port": 0})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "tiny", **config}))
    process = shell.start("launch", tmp_path / "run.yaml")
    url = serving_at(process)
    whole = "".join(answer(url))
    pieces = answer(url)
    first = next(pieces)
    (head,) = [found for found in shell.processes() if found.name() == "gcs_server"]
    head.kill()
    assert first + "".join(pieces) == whole
    assert "Ray is lost: its gcs_server" in read_until(process, "Ray is lost")
    assert "".join(answer(serving_at(process))) == whole
    assert process.poll() is None
    assert shell.run("down", "tiny").code == 0
    process.wait(30)
    shell.assert_nothing_left()


def serving_at(process: subprocess.Popen[str]) -> str:
    """The URL without /v1."""
    return read_until(process, "serving").splitlines()[-1].split()[3].removesuffix("/v1")


def answer(url: str) -> Iterator[str]:
    """The pieces of a long one, as they come."""
    body = {"prompt": "a", "max_tokens": 150, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line.removeprefix("data: "))
                assert "choices" in piece, piece
                yield piece["choices"][0]["text"]
