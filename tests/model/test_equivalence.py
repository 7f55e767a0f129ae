"""The proof of the model path: the same numbers as transformers' eager forward, however the model is cut and stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from logits_spy import captured_logits
from small_engine import PROMPTS, greedy_reference, run_config

from dist_infer import LLM, SamplingParams
from partition.families import family_table

FAMILIES = ("llama", "qwen3", "gemma3_text", "mixtral")
OTHERS = tuple(sorted(family_table().keys() - set(FAMILIES)))  # a family in the table is a promise
NEW_TOKENS = 10


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "streamed"), list(itertools.product((1, 2), (1, 2), (False, True))), ids=str
)
def test_tokens_and_logprobs_equal_transformers(
    model_type: str,
    tensor: int,
    pipeline: int,
    streamed: bool,
    tiny_checkpoint: Callable[..., Path],
    store_root: Path,
) -> None:
    """Guards sharding (uneven KV groups, packed experts), stage cuts, chunked prefill, ragged decode, paging."""
    assert_equal_to_transformers(model_type, tensor, pipeline, streamed, tiny_checkpoint, store_root)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
@pytest.mark.parametrize(("tensor", "pipeline", "streamed"), [(2, 2, True)], ids=str)
def test_every_accepted_family_equals_transformers(
    model_type: str,
    tensor: int,
    pipeline: int,
    streamed: bool,
    tiny_checkpoint: Callable[..., Path],
    store_root: Path,
) -> None:
    """What is not refused by name gives the numbers that transformers gives."""
    assert_equal_to_transformers(model_type, tensor, pipeline, streamed, tiny_checkpoint, store_root)


def assert_equal_to_transformers(
    model_type: str,
    tensor: int,
    pipeline: int,
    streamed: bool,
    tiny_checkpoint: Callable[..., Path],
    store_root: Path,
) -> None:
    """Greedy tokens, and the log-probabilities of the five likeliest at each."""
    path = tiny_checkpoint(model_type)
    tokens, logits = greedy_reference(path, PROMPTS, NEW_TOKENS)
    config = run_config(path, store_root, streamed=streamed, tensor=tensor, pipeline=pipeline)
    with LLM(config) as llm:
        resident = sum(unit.tier != "nvme" for rank in llm.plan.ranks for unit in rank.units)
        total = sum(len(rank.units) for rank in llm.plan.ranks)
        assert (resident < total) is streamed, "the budget of this test no longer makes it stream (or stay resident)"
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=5)
        outputs = llm.generate(PROMPTS, params)
        llm.integrity()
    for output, expected, rows in zip(outputs, tokens, logits, strict=True):
        answer = output.outputs[0]
        assert answer.token_ids == expected
        assert answer.logprobs is not None
        for found, row in zip(answer.logprobs, rows.log_softmax(-1), strict=True):
            for token, entry in found.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)


def test_logits_equal_eager(
    tiny_checkpoint: Callable[..., Path], store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative error of the whole streamed path against eager, fp32, one request at a time; windows: test_kv_kinds."""
    for model_type in ("llama", "mixtral"):
        path = tiny_checkpoint(model_type)
        _, logits = greedy_reference(path, PROMPTS, NEW_TOKENS)
        config = run_config(path, store_root, streamed=True, pipeline=2)
        config["engine"]["max_requests"] = 1
        found = torch.cat(captured_logits(config, PROMPTS, NEW_TOKENS, monkeypatch))
        wanted = torch.cat(logits)
        error = (found - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-5, f"{model_type}: {error:.1e}"
