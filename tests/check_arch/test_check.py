"""The check itself, end to end: right models are equal, a wrong one is seen, an error is a finding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_infer.check_arch import check as module
from dist_infer.check_arch.check import check, refusal
from dist_infer.check_arch.checkpoint import write_checkpoint
from dist_infer.check_arch.layout import Layout, layouts_of
from dist_infer.check_arch.models_page import row_of, rows_of
from dist_infer.check_arch.reference import Reference
from dist_infer.check_arch.run import PROMPTS
from dist_infer.check_arch.tiny_config import tiny_config
from dist_infer.check_arch.verdict import TOLERANCE
from dist_infer.model.adapter import StageModel
from partition.errors import BudgetError, CheckpointError, ConfigError, UnsupportedModelError, WorkerError

RESIDENT = Layout(tensor=1, pipeline=1, streamed=False)
STREAMED = Layout(tensor=1, pipeline=2, streamed=True)
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
KEPT_CURRENT = ("llama", "qwen3_moe", "deepseek_v3", "gemma3_text", "gpt2")  # rows of docs/models.md


def test_a_right_model_is_equal_resident_and_streamed(tmp_path: Path) -> None:
    """Guards the whole chain: config, checkpoint, reference, stores, plans, steps, comparison."""
    report = check("llama", (RESIDENT, STREAMED), tmp_path)
    assert report.verdict == "equal", report
    assert report.path == "packed"
    assert report.kv_bytes_per_token == 2 * 8 * 2 * 16 * 4  # keys and values, 8 layers of 2 heads of 16 floats
    resident, streamed = report.layouts
    assert resident.bytes_streamed == 0
    assert streamed.bytes_streamed > 0
    assert resident.num_positions == resident.num_agreeing == 24
    assert report.error is not None
    assert 0 < report.error <= 1e-5


def test_the_checkpoint_is_in_several_files(tmp_path: Path) -> None:
    """Guards the form of published checkpoints: an index, and tensors spread over files."""
    check("llama", (), tmp_path)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text", "granitemoe_swa"])
def test_rounding_alone_is_far_from_the_tolerance(model_type: str, tmp_path: Path) -> None:
    """Guards the tiny weights: where eager in float32 is itself off, a right model would be called wrong."""
    write_checkpoint(tiny_config(model_type), tmp_path)
    tokens = PROMPTS[0]
    found = Reference(tmp_path).logprobs(tokens)
    exact = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.inference_mode():
        logits = exact(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    wanted = torch.log_softmax(logits, dim=-1)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < TOLERANCE / 2


def test_a_wrong_model_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the check: logits that are a thousandth too large change no token, and are wrong."""
    finish = StageModel.finish

    def scaled(self: StageModel, *rest: Any, **named: Any) -> torch.Tensor:
        return finish(self, *rest, **named) * 1.001

    monkeypatch.setattr(StageModel, "finish", scaled)
    report = check("llama", (RESIDENT,), tmp_path)
    assert report.verdict == "wrong"
    assert report.layouts[0].error is not None
    assert report.layouts[0].error > 1e-4


def test_an_error_in_a_run_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the difference between what is refused and what breaks."""

    def broken(self: StageModel, *rest: Any, **named: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(StageModel, "layer", broken)
    report = check("llama", (RESIDENT,), tmp_path)
    assert report.verdict == "failed"
    assert "no such thing" in report.remark


def test_a_refusal_in_a_run_has_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the remark: why, without the path of a temporary directory."""

    def refuse(checkpoint: Path, store: Path, layout: Layout) -> None:
        raise UnsupportedModelError(f"{checkpoint}: its layers are of glass")

    monkeypatch.setattr(module, "run_layout", refuse)
    report = check("llama", (RESIDENT,), tmp_path)
    assert (report.verdict, report.remark) == ("refused", "its layers are of glass")


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (UnsupportedModelError("hybrid"), True),
        (CheckpointError("a tensor is missing"), True),
        (ConfigError("parallel.tensor is 2, but"), True),
        (BudgetError("needs 3 GiB"), False),
        (WorkerError("rank 0 failed in step 0: UnsupportedModelError: layers [1] do not", rank=0), True),
        (WorkerError("rank 0 failed in step 0: RuntimeError: size of tensor", rank=0), False),
        (RuntimeError("bug"), False),
    ],
)
def test_what_is_a_refusal(error: Exception, refused: bool) -> None:
    """Guards against calling a crash a refusal, and a refusal in a rank a crash."""
    assert refusal(error) is refused


def test_a_directory_is_checked_by_its_config(tmp_path: Path) -> None:
    """Guards PATH: only config.json is read, weights need not be there."""
    model = tmp_path / "published"
    model.mkdir()
    config = {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (tmp_path / "work").mkdir()
    report = check(str(model), (RESIDENT,), tmp_path / "work")
    assert (report.model_type, report.verdict) == ("qwen2", "equal"), report


def test_a_type_that_transformers_cannot_make_is_named(tmp_path: Path) -> None:
    """Guards the rows without a reference: the reason is there, and nothing is called wrong."""
    report = check("gemma4_assistant", (RESIDENT,), tmp_path)
    assert report.verdict == "no-reference"
    assert "hidden_size_per_layer_input" in report.remark


def test_a_composite_without_a_text_type_is_refused(tmp_path: Path) -> None:
    """Guards types that our own path refuses by their config: that is what a user meets."""
    assert check("mllama", (RESIDENT,), tmp_path).verdict == "refused"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KEPT_CURRENT)
def test_the_page_is_current(model_type: str, tmp_path: Path) -> None:
    """Guards docs/models.md against a family that was broken, or mended, since it was written."""
    report = check(model_type, layouts_of(tensor=(1,)), tmp_path)
    assert rows_of(PAGE.read_text(encoding="utf-8"))[model_type] == row_of(report), report
