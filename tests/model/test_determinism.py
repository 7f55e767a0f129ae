"""What a plan may change in the numbers, and what it may not: docs/determinism.md, as tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from half_precision import eager_logits, models_of, own_logits, typical_error
from logits_spy import captured_logits, logits_of_requests
from small_engine import PROMPTS, run_config

NEW_TOKENS = 10
# Of the largest logit: matrix products of another number of rows are summed in another order.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-5, "float16": 2**-8}


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        *itertools.product(("llama", "gemma3_text", "mixtral", "deepseek_v3"), ("float32", "bfloat16")),
        ("gpt_oss", "float16"),
    ],
)
def test_tier_and_stage_cut_change_no_bit(
    model_type: str,
    dtype: str,
    tiny_checkpoint: Callable[..., Path],
    store_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a slot that is overwritten while in use, a stale binding, and lossy hand-over between stages."""
    path = tiny_checkpoint(model_type, **({"num_local_experts": 4} if model_type == "gpt_oss" else {}))
    runs = {}
    for pipeline, streamed in ((1, False), (1, True), (2, True)):
        config = run_config(path, store_root, streamed=streamed, pipeline=pipeline, dtype=dtype)
        runs[pipeline, streamed] = captured_logits(config, PROMPTS, NEW_TOKENS, monkeypatch)
    baseline = runs.pop((1, False))
    assert len(baseline) > NEW_TOKENS
    for cut, found in runs.items():
        assert len(found) == len(baseline), cut
        assert all(torch.equal(a, b) for a, b in zip(found, baseline, strict=True)), cut


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("llama", "float32"),
        ("gemma2", "float32"),
        ("mixtral", "float32"),
        ("deepseek_v3", "float32"),
        ("llama", "bfloat16"),
        ("gemma2", "bfloat16"),
        ("gemma2", "float16"),
    ],
)
def test_batch_composition_stays_within_the_tolerance(
    model_type: str,
    dtype: str,
    tiny_checkpoint: Callable[..., Path],
    store_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards a request that sees another's keys, positions or masks: alone, in other chunks, and in a ragged batch."""
    config = run_config(tiny_checkpoint(model_type), store_root, streamed=False, dtype=dtype)
    together = logits_of_requests(config, PROMPTS, NEW_TOKENS, monkeypatch)
    config["engine"]["max_requests"] = 1
    alone = logits_of_requests(config, PROMPTS, NEW_TOKENS, monkeypatch)
    num_decided = 0
    for found, wanted in zip(together, alone, strict=True):
        tokens, expected = found.argmax(-1), wanted.argmax(-1)
        if dtype == "float32":
            assert torch.equal(tokens, expected)
        # Rows of equal contexts: up to the first token that differs, with its row.
        same = int((tokens == expected).cumprod(0).sum()) + 1
        one, other = found[:same].float(), wanted[:same].float()
        tolerance = TOLERANCE[dtype] * float(other.abs().max())
        assert float((one - other).abs().max()) <= tolerance
        best = other.topk(2, dim=-1).values
        decided = best[:, 0] - best[:, 1] > 2 * tolerance
        assert torch.equal(tokens[:same][decided], expected[:same][decided])
        num_decided += int(decided.sum())
    assert num_decided >= NEW_TOKENS, "hardly a row whose top-1 the tolerance decides"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_what_others_say_changes_no_bit(
    model_type: str,
    dtype: str,
    tiny_checkpoint: Callable[..., Path],
    store_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards any reading across requests: with the same shapes a dense model's row depends on its own request alone."""
    config = run_config(tiny_checkpoint(model_type), store_root, streamed=False, dtype=dtype)
    others = [[tokens[0] + 1] * len(tokens) for tokens in PROMPTS[1:]]
    one, *rest = logits_of_requests(config, PROMPTS, NEW_TOKENS, monkeypatch)
    same, *changed = logits_of_requests(config, [PROMPTS[0], *others], NEW_TOKENS, monkeypatch)
    assert torch.equal(one, same)
    assert not torch.equal(rest[0], changed[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3", "gpt_oss", "gemma2"])
def test_tensor_ranks_in_half_precision_are_about_as_exact_as_one(
    model_type: str, dtype: torch.dtype, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Guards partial sums that are rounded more often than once a rank. In float32: tests/model/test_tensor_degrees."""
    paths = models_of(model_type, tiny_checkpoint)
    exact = [eager_logits(path, torch.float32) for path in paths]
    one = typical_error([own_logits(path, dtype) for path in paths], exact)
    two = typical_error([own_logits(path, dtype, tensor=2) for path in paths], exact)
    assert two <= 1.5 * one
