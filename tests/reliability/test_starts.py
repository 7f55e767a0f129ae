"""FAULTS T06, T26: ranks that die or say nothing while a run starts; many starts at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from named_runs import Shell, until
from reliability.figures import IS_WHOLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
_RANK = {"local": "dist_infer.worker.child", "ray": "RankActor"}
_STARTS = [("local", "SIGKILL"), ("ray", "SIGSTOP")]
_ALL_STARTS = [*_STARTS, ("ray", "SIGKILL"), ("local", "SIGSTOP")]
NUM_LAUNCHES = 8 if IS_WHOLE else 3


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made.close()


def write_run(directory: Path, config: dict[str, Any], name: str = "tiny", **cluster: object) -> Path:
    """Two tensor ranks that answer one prompt."""
    found = {
        **config,
        "name": name,
        "parallel": {"tensor": 2},
        "cluster": {**config["cluster"], **cluster},
        "run": {"kind": "generate", "chat": False, "max_tokens": 4, "prompts": ["the sea"]},
    }
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(found))
    return file


def ranks_of(shell: Shell, executor: str) -> list[psutil.Process]:
    found = []
    for process in shell.processes():
        try:
            if any(_RANK[executor] in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(("executor", "fault"), _ALL_STARTS if IS_WHOLE else _STARTS)
def test_a_rank_that_does_not_come_up(
    executor: str, fault: str, shell: Shell, config: dict[str, Any], tmp_path: Path
) -> None:
    """T06: within the start deadline the launch ends with exit code 4 and says which rank; nothing is left."""
    file = write_run(tmp_path, config, executor=executor, start_timeout="20 s")
    process = shell.start("launch", file, "--no-preflight")
    victims: list[psutil.Process] = []

    def has_come() -> bool:
        assert process.poll() is None, process.communicate()[0]
        victims[:] = ranks_of(shell, executor)
        return bool(victims)

    until(has_come, 60)
    victims[0].send_signal(getattr(signal, fault))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 4, said
    assert "rank" in said.partition("error: ")[2], said
    assert "Traceback" not in said
    shell.run("down", "tiny")
    shell.assert_nothing_left()


def test_many_launches_at_once(shell: Shell, config: dict[str, Any], tmp_path: Path) -> None:
    """T26: each finds ports of its own for its ranks to meet at."""
    names = [f"run{number}" for number in range(NUM_LAUNCHES)]
    many = [shell.start("launch", write_run(tmp_path, config, name), "--no-preflight") for name in names]
    for process in many:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert "(length, 4 tokens)" in said
    shell.assert_nothing_left()
