"""Whether the way to the device changes a bit: one random model, answers from every tier, compared exactly.

The large model's weights are zeros, with which a unit computed from another one's bytes would not be noticed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forward import decode
from job import Shape, clock, read_job
from ours import fitted, run_file
from transformers import AutoConfig, AutoModelForCausalLM

from dist_infer import LLM, SamplingParams

_BATCH = 8


def main() -> None:
    job, started = read_job(), clock()
    folder = Path(job.model)
    _write_random(folder, job.shape)
    tiers = ("host", "nvme") if torch.device(job.device).type == "cuda" else ("nvme",)
    run_files = {"resident": run_file(job, {})} | {tier: fitted(replace(job, setting=tier)) for tier in tiers}
    answers: dict[str, list[list[tuple[int, float]]]] = {}
    streamed = {}
    for name, values in run_files.items():
        with LLM(values) as llm:
            streamed[name] = llm.plan.ranks[0].streamed_bytes_per_pass
            params = SamplingParams(max_tokens=job.new_tokens, temperature=0, ignore_eos=True, logprobs=0)
            outputs = llm.generate(job.prompts(_BATCH), params)
        answers[name] = []
        for output in outputs:
            ids, logprobs = output.outputs[0].token_ids, output.outputs[0].logprobs or []
            answers[name].append([(token, entry[token].logprob) for token, entry in zip(ids, logprobs, strict=True)])
    result = {
        "equal": {name: answer == answers["resident"] for name, answer in answers.items()},
        "streamed_bytes": streamed,
        "tokens_as_transformers": _agreement(job.device, folder, job.prompts(_BATCH), answers["resident"]),
        "seconds": clock() - started,
    }
    print(json.dumps(result), flush=True)


def _write_random(folder: Path, shape: Shape) -> None:
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.config()), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # far from the small default, so that errors show
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)


def _agreement(device: str, folder: Path, prompts: list[list[int]], answers: list[list[tuple[int, float]]]) -> float:
    """Of all tokens, the share that comes before a sequence first differs from transformers' own (rounding does it)."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    _, theirs = decode(model, prompts, len(answers[0]), device)
    same = total = 0
    for mine, other in zip(answers, theirs, strict=True):
        ids = [token for token, _ in mine]
        first = next((i for i, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b), len(ids))
        same, total = same + first, total + len(ids)
    return same / total


if __name__ == "__main__":
    main()
