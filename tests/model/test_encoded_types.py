"""A model kept in an at-rest encoding computes what transformers computes with the decoded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_engine import PROMPTS, greedy_reference, run_config
from transformers import AutoModelForCausalLM

from dist_infer import LLM, SamplingParams
from dist_infer.check_arch.checkpoint import write_checkpoint
from dist_infer.check_arch.tiny_config import tiny_config
from dist_infer.startup import spec_of
from offload.quantize import encode
from partition.encoding import EncodingChoice
from partition.sharding import units_of


@pytest.mark.parametrize("model_type", ["qwen3_next", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_encoded_weights_give_the_numbers_of_decoded_ones(model_type: str, tmp_path: Path, store_root: Path) -> None:
    """Against the float weights a random qwen3_next differs by 1 in a log-probability: it carries any error of its
    weights on thirteen-fold, and flips experts. So what is compared is the computation, not the rounding.
    """
    config = tiny_config(model_type)
    write_checkpoint(config, tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    choice = EncodingChoice(wished="int8")
    encoded, prompts = 0, PROMPTS[1:]
    with torch.no_grad():
        for unit in units_of(spec_of(config.to_dict())):
            for parameter in unit.parameters:
                if (encoding := choice.of(unit.name, parameter, parameter.shape)) != "raw":
                    weight = model.get_parameter(parameter.name)
                    weight.copy_(encode(weight.detach(), encoding, torch.float32).decode())
                    encoded += 1
    assert encoded > 3 * config.num_hidden_layers
    model.save_pretrained(tmp_path / "decoded")
    tokens, logits = greedy_reference(tmp_path / "decoded", prompts, 3)
    run = run_config(tmp_path / "float", store_root, streamed=False)
    run["offload"]["encoding"] = "int8"
    run["engine"]["kv_memory"] = 2_000_000
    with LLM(run) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, logprobs=5))
    for output, expected, rows in zip(outputs, tokens, logits, strict=True):
        answer = output.outputs[0]
        assert list(answer.token_ids) == expected
        assert answer.logprobs is not None
        for found, row in zip(answer.logprobs, rows.log_softmax(-1), strict=True):
            for token, entry in found.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
