"""DeepSpeed ZeRO-Inference: ZeRO stage 3 with parameters on NVMe through async_io.

Weights go from safetensors into DeepSpeed's partitions one parameter at a time, which keeps the load in bounded memory
(from_pretrained holds the whole state dict); DeepSpeed writes them to its own files at every start.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from recorder import Recorder
from safetensors import safe_open

with contextlib.redirect_stdout(open(os.devnull, "w")):
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

_BUFFERS = 6


def settings(scratch: str, largest: int, hidden: int) -> dict[str, Any]:
    """What its own ZeRO-Inference example and its NVMe tuning guide set, for a batch of one process."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 4 * largest // _BUFFERS,
            "stage3_param_persistence_threshold": hidden,
            "stage3_max_live_parameters": 2 * largest,
            "offload_param": {
                "device": "nvme",
                "nvme_path": scratch,
                "pin_memory": True,
                "buffer_count": _BUFFERS,
                "buffer_size": largest,
            },
        },
        "aio": {
            "block_size": 8 << 20,
            "queue_depth": 32,
            "intra_op_parallelism": 4,
            "single_submit": False,
            "overlap_events": True,
        },
        "steps_per_print": 1_000_000,
        "wall_clock_breakdown": False,
    }


def stored(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, file by file."""
    where: dict[str, str] = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in where.items():
        with safe_open(model / file, framework="pt") as opened:
            yield name, opened.get_tensor(name)


def main() -> None:
    recorder = Recorder()
    job = recorder.job
    torch.set_num_threads(job.threads)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29592")
    model_folder = Path(job.model)
    config = AutoConfig.from_pretrained(model_folder)
    widest = max(config.vocab_size, config.intermediate_size)
    chosen = settings(job.scratch, widest * config.hidden_size, config.hidden_size)
    deepspeed.init_distributed("gloo")
    with deepspeed.zero.Init(config_dict_or_path=chosen, dtype=torch.bfloat16), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    for name, tensor in stored(model_folder):
        with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
            parameters[name].data.copy_(tensor)
    model = deepspeed.initialize(model=model, config=chosen)[0].module.eval()
    recorder.loaded()

    inputs = torch.tensor(job.prompts())
    answers: list[list[int]] = [[] for _ in range(job.batch)]
    cache = None
    with torch.inference_mode():
        for _ in range(job.new_tokens):
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            inputs = output.logits[:, -1].argmax(-1, keepdim=True)
            for answer, token in zip(answers, inputs[:, 0].tolist(), strict=True):
                answer.append(token)
            recorder.tokens(sum(map(len, answers)))
    recorder.finish(
        answers,
        ("torch", "transformers", "deepspeed"),
        {
            "aio": chosen["aio"],
            "zero_optimization": chosen["zero_optimization"],
            "largest": math.prod((widest, config.hidden_size)),
        },
    )


if __name__ == "__main__":
    main()
