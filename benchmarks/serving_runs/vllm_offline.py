"""vLLM's engine in its own environment, without HTTP: JSON of what one round measures on the last line of stdout.

The job is that of ours_offline.py, with `model` for `config`. vLLM's offline API has no stream, so the first token's
time is that of an answer of one token, which flatters nobody: it is the whole call.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


def main() -> None:
    job = json.loads(sys.argv[1])
    prompts = [json.loads(line)["prompt"] for line in Path(job["prompts"]).read_text().splitlines()]
    llm = LLM(
        model=job["model"],
        dtype="bfloat16",
        max_model_len=job["max_model_len"],
        max_num_seqs=job["concurrency"],
        enable_prefix_caching=False,
    )
    some = (prompts * (1 + job["requests"] // len(prompts)))[: job["requests"]]
    llm.generate(some[: job["concurrency"]], _params(8), use_tqdm=False)
    begin = time.perf_counter()
    outputs = llm.generate(some, _params(job["tokens"]), use_tqdm=False)
    seconds = time.perf_counter() - begin
    first = []
    for prompt in some[: job["singles"]]:
        start = time.perf_counter()
        llm.generate([prompt], _params(1), use_tqdm=False)
        first.append(time.perf_counter() - start)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(json.dumps({"tokens_per_s": tokens / seconds, "ttft_s": statistics.median(first)}), flush=True)


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


if __name__ == "__main__":
    main()
