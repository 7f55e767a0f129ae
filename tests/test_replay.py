"""Real ranks that are lost in the middle of a pass: answers of every kind go on where they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import make_tokenizer

from dist_infer import LLM, Grammar, SamplingParams
from dist_infer.model.adapter import StageModel
from dist_infer.outputs import Finished, TokenEvent, TokenLogprobs

PROMPTS = [[(7 * i + 3 * k) % 150 + 5 for i in range(9 + 4 * k)] for k in range(6)]
PARAMS = [
    SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_tokens=24, seed=1, ignore_eos=True, n=3),
    SamplingParams(max_tokens=24, seed=2, ignore_eos=True, grammar=Grammar.regex(r"(\([a-z]{1,9}\)[0-9]{1,9};)*")),
    SamplingParams(max_tokens=24, seed=3, ignore_eos=True, repetition_penalty=1.5, frequency_penalty=1, min_tokens=20),
    SamplingParams(max_tokens=24, seed=4, temperature=2, top_k=300, bad_words=["a", "e"], logit_bias={70: 3.0}),
    SamplingParams(max_tokens=24, seed=5, ignore_eos=True, stop=["th", "z"]),
]


@dataclass(frozen=True)
class Said:
    """One request: its answers' tokens and texts, each as the events gave them, and the figures beside them."""

    answers: list[tuple[list[int], str]]
    prompt_logprobs: list[TokenLogprobs | None] | None
    logprobs: list[TokenLogprobs] | None


def say(llm: LLM) -> list[Said]:
    given: dict[tuple[int, int], list[TokenEvent]] = {}
    found: dict[int, Said] = {}
    for request, event in llm.events([(None, prompt) for prompt in PROMPTS], PARAMS):
        if isinstance(event, TokenEvent):
            given.setdefault((request, event.index), []).append(event)
            continue
        assert isinstance(event, Finished), event
        answers = []
        for one in event.output.outputs:
            events = given[request, one.index]
            assert [token for each in events for token in each.token_ids] == one.token_ids  # none twice, none left out
            assert "".join(each.text for each in events) == one.text
            answers.append((one.token_ids, one.text))
        found[request] = Said(answers, event.output.prompt_logprobs, event.output.outputs[0].logprobs)
    return [found[request] for request in range(len(PROMPTS))]


def close_to(found: TokenLogprobs | None, expected: TokenLogprobs | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found.keys() == expected.keys() and all(
        one.logprob == pytest.approx(expected[token].logprob, abs=1e-4) for token, one in found.items()
    )


def run_config(path: Path, store: Path) -> dict[str, Any]:
    """Prompts take several steps, and not all requests have room at a time."""
    return {
        "model": {"path": str(path), "dtype": "float32"},
        "parallel": {"pipeline": 2},
        "offload": {"store": str(store)},
        "engine": {
            "kv_memory": "1 MiB",
            "block_tokens": 4,
            "max_batch_tokens": 16,
            "max_requests": 5,
            "max_model_len": 96,
        },
        "cluster": {"device": "cpu", "max_restarts": 20},
    }


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("replay") / "model"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=640, num_hidden_layers=2), directory)
    make_tokenizer("byte-level", directory)
    return directory


def test_losses_in_the_middle_of_passes_change_no_answer(
    path: Path, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the replay on ranks that are real: rows, draws, penalties' histories, places in grammars, scores.

    Each number is of layer calls until the next loss: in the first step, between two, in the last layer of one.
    """
    with LLM(run_config(path, store_root)) as llm:
        expected = say(llm)
    layer, left = StageModel.layer, [1, 2, 9, 30, 7, 24]
    num_losses = len(left)

    def failing(self: StageModel, *arguments: Any) -> Any:
        if left:
            left[0] -= 1
            if left[0] == 0:
                del left[0]
                raise RuntimeError("planted")
        return layer(self, *arguments)

    monkeypatch.setattr(StageModel, "layer", failing)
    with LLM(run_config(path, store_root)) as llm:
        found = say(llm)
        assert llm.stats.num_gang_restarts == num_losses
        assert not left
        llm.integrity()
    assert [said.answers for said in found] == [said.answers for said in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for mine, other in ((ours.prompt_logprobs, theirs.prompt_logprobs), (ours.logprobs, theirs.logprobs)):
            assert (mine is None) == (other is None)
            assert all(close_to(a, b) for a, b in zip(mine or [], other or [], strict=True))
