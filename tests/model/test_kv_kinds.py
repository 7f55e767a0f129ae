"""Latent rows and rings through the whole path, against transformers' eager forward, on contexts of many windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from logits_spy import captured_logits
from small_engine import greedy_reference

from dist_infer import LLM, SamplingParams
from dist_infer.model.describe import unchecked_types
from partition import allocation
from partition.kv_layout import layers_kv, paged_bytes_per_token, ring_bytes_per_request, ring_rows_of
from partition.model_spec import ModelSpec
from partition.sharding import cut_axes

PROMPTS = [[(7 * i + 3 * k) % 157 + 3 for i in range(n)] for k, n in enumerate((43, 3, 21))]
NEW_TOKENS = 9
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
LATENT: dict[str, dict[str, Any]] = {  # a rank of 16 is always absorbed, one of 48 expanded for long chunks
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v2, expanded, yarn": {"kv_lora_rank": 48, "rope_parameters": YARN, "q_lora_rank": None},
    "deepseek_v3, expanded, yarn": {"kv_lora_rank": 48, "rope_parameters": YARN, "rope_interleave": False},
}
WINDOWED: dict[str, dict[str, Any]] = {
    "gemma3_text": {},
    "mistral": {},
    "cohere2": {},
    "gemma2": {},
    "phi3": {"sliding_window": 6},
    "qwen3": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 3},
}
CASES = LATENT | WINDOWED


def run_config(path: Path, store: Path, **engine: Any) -> dict[str, Any]:
    """Chunks of 8 tokens, so that rings of window + 8 rows wrap in the middle of chunks; KV blocks of 4."""
    wanted = {"kv_memory": 2_000_000, "block_tokens": 4, "max_batch_tokens": 8, "max_requests": 3, "max_model_len": 64}
    return {
        "model": {"path": str(path)},
        "offload": {"store": str(store), "slots": 2},
        "engine": wanted | engine,
        "cluster": {"executor": "local", "device": "cpu"},
    }


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(request.param.partition(",")[0], **CASES[request.param])


@pytest.mark.parametrize("checkpoint", CASES, indirect=True)
def test_logits_equal_eager(checkpoint: Path, store_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request at a time: prefill in chunks, then decode past every window, in fp32."""
    _, logits = greedy_reference(checkpoint, PROMPTS, NEW_TOKENS)
    found = torch.cat(
        captured_logits(run_config(checkpoint, store_root, max_requests=1), PROMPTS, NEW_TOKENS, monkeypatch)
    )
    wanted = torch.cat(logits)
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "pipeline"), [("deepseek_v3", 1), ("gemma3_text", 2)], indirect=["checkpoint"], ids=str
)
def test_preempted_requests_begin_again_with_rows_of_their_own(
    checkpoint: Path, store_root: Path, pipeline: int
) -> None:
    """KV blocks for one long request and a little: others lose theirs, and their rings to whoever comes next."""
    new_tokens = 21  # a prompt of 43 then ends at 64, in 16 blocks; two of 21 tokens begin with 6 blocks each
    tokens, _ = greedy_reference(checkpoint, PROMPTS, new_tokens)
    config = run_config(checkpoint, store_root)
    spec = ModelSpec.from_config(json.loads((checkpoint / "config.json").read_text()))
    rings = ring_rows_of(spec, max_batch_tokens=8, max_model_len=64)
    kept = layers_kv(spec, cut_axes(spec, 1), 0, rings)
    per_block, per_request = 4 * paged_bytes_per_token(kept, "float32"), ring_bytes_per_request(kept, "float32")
    config["engine"]["kv_memory"] = (17 * per_block + 3 * per_request) // pipeline  # of one rank
    config["parallel"] = {"pipeline": pipeline}
    with LLM(config) as llm:
        assert llm.plan.num_kv_blocks == 17
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        order = (2, 2, 1, 0, 2)
        outputs = llm.generate([PROMPTS[i] for i in order], params)
        llm.integrity()
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert [list(output.outputs[0].token_ids) for output in outputs] == [tokens[i] for i in order]


@pytest.mark.parametrize("checkpoint", ["gemma3_text", "mistral", "cohere2"], indirect=True)
def test_rings_give_the_bits_of_blocks(checkpoint: Path, store_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give attention the same keys in the same order, so not one bit may differ."""
    with_rings = captured_logits(run_config(checkpoint, store_root), PROMPTS, NEW_TOKENS, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "ring_rows_of", lambda *_, **__: ())
        with_blocks = captured_logits(run_config(checkpoint, store_root), PROMPTS, NEW_TOKENS, monkeypatch)
    assert len(with_rings) == len(with_blocks) > NEW_TOKENS
    assert all(torch.equal(a, b) for a, b in zip(with_rings, with_blocks, strict=True))


def test_rings_are_used_and_small(tiny_checkpoint: Callable[..., Path], store_root: Path) -> None:
    """The tests above would pass without them."""
    for model_type, changes in WINDOWED.items():
        with LLM(run_config(tiny_checkpoint(model_type, **changes), store_root)) as llm:
            windows = llm.plan.model.windows
            assert llm.plan.ring_rows == tuple(window + 8 if window else 0 for window in windows)
            assert [report.kv_bytes for report in llm.gang.reports] == [rank.kv_bytes for rank in llm.plan.ranks]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["deepseek_v3", "gemma3_text", "mistral"], indirect=True)
def test_answers_that_share_a_prompt_take_over_its_rows(checkpoint: Path, store_root: Path) -> None:
    """Blocks are shared, the rows of a block in part and whole rings are copied: greedy answers are all the same."""
    tokens, _ = greedy_reference(checkpoint, PROMPTS, NEW_TOKENS)
    with LLM(run_config(checkpoint, store_root)) as llm:
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, n=3)
        outputs = llm.generate(PROMPTS, params)
        llm.integrity()
    for output, expected in zip(outputs, tokens, strict=True):
        assert [list(answer.token_ids) for answer in output.outputs] == [expected] * 3


def test_a_type_outside_of_the_table_keeps_its_latent_too(
    tiny_checkpoint: Callable[..., Path], store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the class has tells it: glm4_moe_lite is in no table of ours."""
    dims = {"kv_lora_rank": 48, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
    path = tiny_checkpoint("glm4_moe_lite", num_key_value_heads=4, topk_group=1, num_hidden_layers=3, **dims, **experts)
    _, logits = greedy_reference(path, PROMPTS, NEW_TOKENS)
    config = run_config(path, store_root, max_requests=1)
    with unchecked_types():
        with LLM(config) as llm:
            assert llm.plan.model.latent_dim == 48 + 8
        found = torch.cat(captured_logits(config, PROMPTS, NEW_TOKENS, monkeypatch))
    wanted = torch.cat(logits)
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5
