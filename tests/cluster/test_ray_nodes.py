"""Ray nodes as they are: chosen by labels and resources, stages on the very nodes of the plan, one that is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_infer import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
HERE = Path(__file__).resolve().parent
PROMPTS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What three_nodes.py prints; in a process of its own, as Ray stays in one that has started it."""
    store = tmp_path_factory.mktemp("shared")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(HERE.parent.parent), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, str(HERE / "three_nodes.py"), str(model), str(store)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_nodes_are_chosen_by_labels_and_resources(found: dict[str, Any]) -> None:
    """The coordinator's node comes first, and takes no rank without CPUs; ranks are limited by what each takes."""
    assert found["any"] == [["a", 4], ["b", 2], ["head", 0], ["other", 8]]
    assert found["labelled"][0] == ["head", 0]
    assert sorted(found["labelled"][1:]) == [["a", 4], ["b", 2]]
    assert sorted(found["given"]) == [["a", 1], ["b", 2], ["head", 0]]


def test_no_fitting_node_is_an_error_that_says_what_each_lacks(found: dict[str, Any]) -> None:
    assert found["unlabelled"].startswith("ConfigError: no node of the Ray cluster may take a rank")
    assert "has tier=other, not tier=none" in found["unlabelled"]
    assert "has no label tier, not tier=none" in found["unlabelled"]
    assert "has 8 llm, a rank needs 9" in found["too much"]


def test_each_stage_is_on_its_node_and_a_shared_store_is_packed_once(
    found: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    assert sorted(found["places"]) == [["a"], ["b"]]
    assert found["packed"] == [found["blobs"], 0]
    assert found["blobs"] == 10  # 8 layers, embedding, head
    alone = {"model": {"path": str(model), "dtype": "float32"}, "offload": {"store": str(tmp_path)}}
    with LLM({**alone, "cluster": {"device": "cpu"}, "engine": {"max_model_len": 64}}) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert [list(output.outputs[0].token_ids) for output in outputs] == found["tokens"]


def test_a_node_that_is_lost_is_named_and_no_longer_chosen(found: dict[str, Any]) -> None:
    assert "could not place stage 1" in found["lost"]
    assert "has left the cluster" in found["lost"]
    assert found["left"] == [["head", 0], ["a", 4] if found["gone"] == "b" else ["b", 2]]
