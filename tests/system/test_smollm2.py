"""The demo model against transformers.generate: greedy tokens equal in fp32, for every executor, cut and tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from demo_model import QUESTIONS, SMOLLM2
from logits_spy import captured_logits

from dist_infer import LLM, SamplingParams

NEW_TOKENS = 64
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CASES = [
    ("local", 1, 1),
    ("local", 2, 1),
    ("ray", 2, 1),
    ("ray", 1, 2),
    ("ray", 2, 2),
]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Answers of transformers' own generate to the questions, one by one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from dist_infer.location import resolve_model

    path = resolve_model(SMOLLM2)
    where, file = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    answers = []
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def run_config(executor: str, tensor: int, pipeline: int, streamed: bool, store: Path) -> dict[str, Any]:
    """Chunked prefill (64 tokens a micro-batch), and where streamed at least half of the layers read in each pass."""
    config: dict[str, Any] = {
        "model": {"path": SMOLLM2, "dtype": "float32"},
        "parallel": {"tensor": tensor, "pipeline": pipeline},
        "offload": {"store": str(store)},
        "engine": {"max_requests": 8, "max_model_len": 256, "kv_memory": "48 MiB", "max_batch_tokens": 64},
        "cluster": {"executor": executor, "device": "cpu"},
    }
    if streamed:
        config["offload"]["host_memory"] = "520 MiB" if tensor * pipeline < 4 else "620 MiB"
    return config


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize(("executor", "tensor", "pipeline"), CASES, ids=str)
def test_greedy_tokens_equal_transformers(
    executor: str, tensor: int, pipeline: int, streamed: bool, expected: list[list[int]], store_root: Path
) -> None:
    """Guards the whole way: GGUF reading, packing, TP with uneven heads (9 in 3 groups), PP, streaming, batching."""
    config = run_config(executor, tensor, pipeline, streamed, store_root)
    with LLM(config) as llm:
        layers = [unit for rank in llm.plan.ranks for unit in rank.units if unit.name.startswith("layers")]
        resident = sum(unit.tier != "nvme" for unit in layers)
        assert resident <= len(layers) // 2 if streamed else resident == len(layers)
        outputs = llm.chat(
            [[{"role": "user", "content": question}] for question in QUESTIONS],
            SamplingParams(max_tokens=NEW_TOKENS, temperature=0),
        )
        llm.integrity()
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert "Paris" in outputs[0].outputs[0].text


def test_tier_and_stage_cut_change_no_bit(store_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same micro-batches give the same logits to the last bit, resident or streamed, in one stage or two."""
    prompts = [list(range(100, 190)), list(range(500, 507))]
    runs = {
        (pipeline, streamed): captured_logits(
            run_config("local", 1, pipeline, streamed, store_root), prompts, 6, monkeypatch
        )
        for pipeline in (1, 2)
        for streamed in (False, True)
    }
    baseline = runs.pop((1, False))
    assert len(baseline) >= 6
    for cut, found in runs.items():
        assert len(found) == len(baseline), cut
        assert all(torch.equal(a, b) for a, b in zip(found, baseline, strict=True)), cut
