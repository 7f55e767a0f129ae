"""transformers with accelerate's CPU offload: offloaded modules are copied to the device at each use.

setting: "plain" is what `dispatch_model` does with a device map; "pinned" gives it the offloaded weights in pinned
memory, which it does not do by itself and which makes its copies faster.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import dispatch_model, init_empty_weights
from forward import decode, weights
from job import clock, decode_of, finish, read_job
from link import pinned_rate
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    job, started = read_job(), clock()
    device = job.device
    config = AutoConfig.for_model(**json.loads((Path(job.model) / "config.json").read_text()))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    offloaded = [f"model.layers.{index}" for index in range(job.resident_layers, job.shape.layers)]
    pinned = job.setting == "pinned"
    state = {}
    for name, stored in weights(job.model):
        owner, _, leaf = name.rpartition(".")
        away = any(name.startswith(f"{layer}.") for layer in offloaded)
        value = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=away and pinned).copy_(stored)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        if away:
            state[name] = value
    ends = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places: dict[str, str | int | torch.device] = dict.fromkeys(ends, device)
    places |= {f"model.layers.{index}": device for index in range(job.shape.layers)}
    places |= dict.fromkeys(offloaded, "cpu")
    model = dispatch_model(model.eval(), places, main_device=device, state_dict=state)
    load_s = clock() - started
    decodes = []
    for batch in job.batches:
        before = pinned_rate(device)
        ends, tokens = decode(model, job.prompts(batch), job.new_tokens, device)
        link = (before + pinned_rate(device)) / 2
        decodes.append(
            decode_of(
                batch,
                ends,
                streamed_bytes=sum(value.nbytes for value in state.values()),
                link_bytes_per_s=link,
                tokens=tokens,
            )
        )
    notes = {"setting": job.setting, "device_peak_bytes": torch.cuda.max_memory_allocated()}
    finish(decodes, packages=("accelerate", "transformers", "torch"), load_s=load_s, notes=notes)


if __name__ == "__main__":
    main()
