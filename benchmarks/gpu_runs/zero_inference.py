"""DeepSpeed ZeRO-Inference: stage 3 without an optimizer, parameters in pinned host memory.

setting: "plain". Its own prefetching is given a whole layer at a time and room for three on the device; which layers
stay there cannot be told, so embedding and head move as well.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import torch
from forward import decode, weights
from job import Job, clock, decode_of, finish, read_job
from link import pinned_rate

_PERSISTENT = 100_000  # elements: norms stay on the device


def main() -> None:
    job, started = read_job(), clock()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    on_cuda = torch.device(job.device).type == "cuda"
    deepspeed.init_distributed("nccl" if on_cuda else "gloo")
    settings = config(job)
    model_config = AutoConfig.for_model(**json.loads((Path(job.model) / "config.json").read_text()))
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16), no_init_weights():
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    for name, stored in weights(job.model):  # of one rank a partition is the whole, flat
        parameters[name].ds_tensor.data.copy_(stored.flatten())
    engine = deepspeed.initialize(model=model, config=settings)[0]
    engine.module.eval()
    streamed = sum(2 * p.ds_numel for p in engine.module.parameters() if not p.ds_persist)
    in_pinned = (
        all(p.ds_tensor.is_pinned() for p in engine.module.parameters() if not p.ds_persist) if on_cuda else False
    )
    load_s = clock() - started
    decodes = []
    for batch in job.batches:
        before = pinned_rate(job.device)
        ends, tokens = decode(engine.module, job.prompts(batch), job.new_tokens, job.device)
        link = (before + pinned_rate(job.device)) / 2
        decodes.append(decode_of(batch, ends, streamed_bytes=streamed, link_bytes_per_s=link, tokens=tokens))
    peak = torch.cuda.max_memory_allocated() if on_cuda else 0
    notes = {"setting": settings["zero_optimization"], "pinned": in_pinned, "device_peak_bytes": peak}
    finish(decodes, packages=("deepspeed", "transformers", "torch"), load_s=load_s, notes=notes)
    torch.distributed.destroy_process_group()


def config(job: Job) -> dict[str, object]:
    """As DeepSpeed's ZeRO-Inference examples have it, with prefetching as far as it goes."""
    layer = job.shape.layer_bytes // 2
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": False,
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 3 * layer + job.shape.end_bytes // 2,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": _PERSISTENT,
            "offload_param": {"device": "cpu", "pin_memory": torch.device(job.device).type == "cuda"},
        },
        "steps_per_print": 1_000_000_000,
    }


if __name__ == "__main__":
    main()
