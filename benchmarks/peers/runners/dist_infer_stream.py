"""dist-infer through its Python API: one process, one stage, host_memory auto, the packed store in `scratch`.

setting: the encoding, `float`, `int8`, `int4-g64`, …; with "pack:" before it the store is made and nothing else.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from recorder import Recorder

from dist_infer import LLM, SamplingParams, load_config
from dist_infer.outputs import Failed, TokenEvent


def run_file(recorder: Recorder, encoding: str) -> dict[str, Any]:
    """What a person would write for this job."""
    job = recorder.job
    kind, _, group = encoding.partition("-g")
    offload: dict[str, Any] = {"store": job.scratch, "host_memory": "auto"}
    if kind != "float":
        offload["encoding"] = kind
    if group:
        offload["group_size"] = int(group)
    return {
        "name": "peers",
        "model": {"path": job.model, "dtype": "bfloat16"},
        "offload": offload,
        "engine": {"max_requests": job.batch, "max_model_len": job.prompt_tokens + job.new_tokens},
        "cluster": {"executor": "local", "device": "cpu"},
    }


def pack(recorder: Recorder, encoding: str) -> None:
    """Make the store and print how long that took."""
    from dist_infer.startup import open_model, pack_model

    config = load_config(run_file(recorder, encoding))
    _, report = pack_model(config, open_model(config), lambda _: None)
    document = {"seconds": report.seconds, "bytes_written": report.bytes_written, "num_written": report.num_written}
    print(json.dumps({"pack": document}), flush=True)


def generate(recorder: Recorder, encoding: str) -> None:
    """Answer all prompts in one batch."""
    job = recorder.job
    with LLM(run_file(recorder, encoding)) as llm:
        if llm.gang.pack_report.num_written:
            raise RuntimeError("the store was not there: it was to be packed by a run of its own")
        recorder.loaded()
        prompts: list[tuple[str | None, list[int]]] = [(None, prompt) for prompt in job.prompts()]
        params = SamplingParams(max_tokens=job.new_tokens, temperature=0, ignore_eos=True)
        answers: list[list[int]] = [[] for _ in prompts]
        before = llm.stream_reports()
        seen = 0
        for index, event in llm.events(prompts, [params] * len(prompts)):
            if isinstance(event, Failed):
                raise event.error
            if not isinstance(event, TokenEvent):
                continue
            answers[index] += event.token_ids
            # a step's tokens come one by one: marked when the shortest answer has grown
            if min(map(len, answers)) > seen:
                seen = min(map(len, answers))
                recorder.tokens(sum(map(len, answers)))
        (start,), (end,) = before, llm.stream_reports()
        plan = llm.plan.ranks[0]
        settings = {
            "encoding": encoding,
            "units_streamed": sum(unit.tier == "nvme" for unit in plan.units),
            "units": len(plan.units),
            "streamed_bytes_per_pass": plan.streamed_bytes_per_pass,
            "bytes_streamed": end.bytes_read - start.bytes_read,
            "stall_s": end.stall_s - start.stall_s,
            "compute_s": end.compute_s - start.compute_s,
            "num_passes": end.num_passes - start.num_passes,
        }
        recorder.finish(answers, ("dist-infer", "torch", "transformers"), settings)


def main() -> None:
    recorder = Recorder()
    action, _, encoding = recorder.job.setting.rpartition(":")
    if action not in ("", "pack"):
        sys.exit(f"unknown setting {recorder.job.setting!r}")
    if action == "pack":
        pack(recorder, encoding)
    else:
        generate(recorder, encoding)


if __name__ == "__main__":
    main()
