"""transformers with accelerate's disk offload: modules that memory does not hold are read from safetensors at each use.

setting: "disk" offloads every layer; otherwise the bytes of weights that stay in memory, and the rest is on disk.
"""

from __future__ import annotations

import os

import torch
from recorder import Recorder
from transformers import AutoModelForCausalLM
from transformers.generation import BaseStreamer


class Marks(BaseStreamer):
    """generate() hands over the prompt first, then each step's tokens."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._seen = recorder, -1

    def put(self, value: torch.Tensor) -> None:
        self._seen += 1
        if self._seen:
            self._recorder.tokens(self._seen * value.numel())

    def end(self) -> None:
        """Nothing is held back."""


def main() -> None:
    recorder = Recorder()
    job = recorder.job
    torch.set_num_threads(job.threads)
    resident = 0 if job.setting == "disk" else int(job.setting)
    model = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": resident},
        offload_folder=os.path.join(job.scratch, "offload"),
    )
    # What is to stay is mapped from the checkpoint: under pressure the kernel drops it and reads it again. As ordinary
    # memory it does stay, which is what max_memory asks for.
    for parameter in model.parameters() if resident else ():
        if not parameter.is_meta:
            parameter.data = parameter.data.clone()
    recorder.loaded()
    prompts = torch.tensor(job.prompts())
    with torch.inference_mode():
        output = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=job.new_tokens,
            min_new_tokens=job.new_tokens,
            streamer=Marks(recorder),
        )
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())  # not set where all of it fits
    recorder.finish(
        output[:, prompts.shape[1] :].tolist(),
        ("torch", "transformers", "accelerate", "safetensors"),
        {"resident_bytes": resident, "modules_on_disk": places.count("disk"), "modules": len(places)},
    )


if __name__ == "__main__":
    main()
