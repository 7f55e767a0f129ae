"""dist-infer through its Python API: one process, one stage, as few layers on the device as the job says.

setting: the tier that the other layers stream from, "host" or "nvme" (on a CPU, where both are one memory, "nvme").
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from job import Job, clock, decode_of, finish, read_job
from link import pinned_rate

from dist_infer import LLM, SamplingParams, load_config
from dist_infer.backend import make_backend
from dist_infer.messages import PassRecord
from dist_infer.startup import open_model, plan_run
from offload.machine import measure_read
from partition.errors import BudgetError

_DISK_SECONDS = 1.0


def main() -> None:
    job, started = read_job(), clock()
    file, figures = fitted(job), []
    disk = [_disk_rate(job)]
    with LLM(file, timeline=True) as llm:
        load_s = clock() - started
        (plan,) = llm.plan.ranks
        for batch in job.batches:
            llm.timelines()
            before = pinned_rate(job.device)
            params = SamplingParams(max_tokens=job.new_tokens, temperature=0, ignore_eos=True)
            outputs = llm.generate(job.prompts(batch), params)
            link = (before + pinned_rate(job.device)) / 2
            (timeline,) = llm.timelines()
            passes = [one for one in timeline.passes if one.num_tokens == one.num_sampled == batch]
            _check_bytes(plan.streamed_bytes_per_pass, passes, on_cuda=plan.on_cuda)
            figures.append((batch, link, passes, [list(output.outputs[0].token_ids) for output in outputs]))
        notes = {
            "setting": job.setting,
            "offload": file["offload"],
            "tiers": {tier: sum(unit.tier == tier for unit in plan.units) for tier in ("device", "host", "nvme")},
            "host_slots": plan.num_slots,
            "device_slots": plan.num_device_slots,
            "predicted_tokens_per_s": llm.plan.prediction.decode_tokens_per_s,
            "reader": llm.gang.reports[0].reader,
            "rss_bytes": llm.gang.reports[0].rss_bytes,
            "packed_s": llm.gang.pack_report.seconds,
            "device_peak_bytes": torch.cuda.max_memory_allocated(),
        }
    disk.append(_disk_rate(job))  # not while the streamer lives: it reads ahead
    known = [rate for rate in disk if rate]
    decodes = [
        decode_of(
            batch,
            [one.end_s for one in passes],
            streamed_bytes=plan.streamed_bytes_per_pass,
            link_bytes_per_s=link,
            disk_bytes_per_s=sum(known) / len(known) if known else 0.0,
            stall_s=sum(one.stall_s for one in passes),
            tokens=tokens,
        )
        for batch, link, passes, tokens in figures
    ]
    finish(decodes, packages=("dist-infer", "torch", "transformers"), load_s=load_s, notes=notes)


def run_file(job: Job, offload: Mapping[str, Any]) -> dict[str, Any]:
    """What a person would write for this job, with these memory limits."""
    return {
        "name": "gpu-stream",
        "model": {"path": job.model, "dtype": "bfloat16"},
        "offload": {"store": str(Path(job.work) / "store"), **offload},
        "engine": {
            "max_requests": max(job.batches),
            "max_model_len": job.prompt_tokens + job.new_tokens,
            "max_batch_tokens": max(job.batches) * job.prompt_tokens,
            # said, because a plan for the least memory would give less, and requests would wait for each other
            "kv_memory": max(job.batches) * job.shape.kv_bytes(job.prompt_tokens + job.new_tokens),
        },
        "cluster": {"executor": "local", "device": torch.device(job.device).type},
    }


def fitted(job: Job) -> dict[str, Any]:
    """The run file whose plan keeps `resident_layers` where they are computed, and streams the others from the tier.

    Limits are found by planning: the least that any plan fits into, then what stays on top of it.
    """
    stays = job.resident_layers * job.shape.layer_bytes
    step = max(1 << 20, job.shape.layer_bytes // 16)
    offload: dict[str, Any] = {}
    if torch.device(job.device).type == "cuda":
        offload["device_memory"] = _least(job, offload, "device_memory", step) + job.shape.end_bytes + stays
        stays = 0
    if job.setting == "nvme":
        offload["slots"] = 3
        offload["host_memory"] = _least(job, offload, "host_memory", step) + stays
    return run_file(job, offload)


def _least(job: Job, offload: Mapping[str, Any], key: str, step: int) -> int:
    config = load_config(run_file(job, offload))
    model, backend = open_model(config), make_backend(config.cluster, config.name)
    try:
        facts = backend.facts(with_devices=config.cluster.device != "cpu", sample=None, dtype=None)
        footprint = backend.footprint(1, 1)
        for limit in range(step, 2 * job.shape.num_bytes + (64 << 30), step):
            with suppress(BudgetError):
                plan_run(load_config(run_file(job, {**offload, key: limit})), model, facts, footprint)
                return limit
    finally:
        backend.close()
    raise BudgetError(f"no offload.{key} is enough for a plan of {job.shape}")


def _disk_rate(job: Job) -> float:
    """Raw direct reads of the store, bytes per second; 0 where weights do not come from it, or it is not made yet."""
    files = sorted(Path(job.work, "store").rglob("*.bin"), key=lambda file: file.stat().st_size)
    return measure_read(files[-1], _DISK_SECONDS) if job.setting == "nvme" and files else 0.0


def _check_bytes(streamed: int, passes: list[PassRecord], *, on_cuda: bool) -> None:
    """What the plan says must be what was moved, or the figures are of something else."""
    moved = [one.bytes_copied if on_cuda else one.bytes_read for one in passes]
    # a pass also moves the first units of the next one, and leaves as many of its own to the pass before
    if abs(sum(moved[1:]) - streamed * len(moved[1:])) > streamed:
        raise RuntimeError(f"{moved} bytes moved in passes that stream {streamed}")


if __name__ == "__main__":
    main()
