"""The engine in this process, without HTTP: JSON of what one round measures on stdout.

python ours_offline.py '{"config": {...}, "prompts": FILE.jsonl, "concurrency": 32, "requests": 96, "tokens": 64,
"singles": 20}'
"""

from __future__ import annotations

import json
import queue
import statistics
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

from dist_infer import LLM, SamplingParams
from dist_infer.outputs import Event, Failed, Finished, TokenEvent


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    prompts = [json.loads(line)["prompt"] for line in Path(job["prompts"]).read_text().splitlines()]
    with LLM(job["config"]) as llm:
        _closed_loop(llm, prompts, job["concurrency"], job["concurrency"], 8)  # warm
        tokens, seconds = _closed_loop(llm, prompts, job["concurrency"], job["requests"], job["tokens"])
        first = [_first_token_s(llm, prompt) for prompt, _ in zip(cycle(prompts), range(job["singles"]), strict=False)]
    print(json.dumps({"tokens_per_s": tokens / seconds, "ttft_s": statistics.median(first)}))


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def _closed_loop(llm: LLM, prompts: list[str], width: int, num: int, max_tokens: int) -> tuple[int, float]:
    """(tokens, seconds) of `num` requests, `width` at a time; each event is text as a client would get it."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    asked = cycle(prompts)
    started, num_ended, num_tokens = 0, 0, 0
    begin = time.perf_counter()
    while num_ended < num:
        while started < num and started - num_ended < width:
            text = next(asked)
            llm.submit(text, llm.encode(text), _params(max_tokens), events.put)
            started += 1
        event = events.get(timeout=600)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            num_ended += 1
            num_tokens += len(event.output.outputs[0].token_ids)
    return num_tokens, time.perf_counter() - begin


def _first_token_s(llm: LLM, prompt: str) -> float:
    events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
    begin = time.perf_counter()
    llm.submit(prompt, llm.encode(prompt), _params(8), lambda event: events.put((time.perf_counter(), event)))
    first = None
    while True:
        at_s, event = events.get(timeout=600)
        if isinstance(event, TokenEvent) and first is None:
            first = at_s - begin
        if isinstance(event, Finished) and first is not None:
            return first
        if isinstance(event, Failed):
            raise event.error


if __name__ == "__main__":
    main()
