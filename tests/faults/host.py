"""A process that serves a model, for tests to hurt from outside: `python host.py FD`, orders and answers as JSON.

    open      config, streamed   -> units, streamed, store       a real LLM; streamed: with as little memory as there is
    generate  prompts, max_tokens -> {"first": true}, then tokens, counted while it ran
    close                        -> {}

An error comes back as {"error": its type, "text", "exit_code", "tokens": what had been given out before}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from multiprocessing.connection import Connection
from typing import Any

from dist_infer import LLM, SamplingParams, TokenEvent, load_config
from dist_infer.backend import make_backend
from dist_infer.errors import BudgetError, DistInferError
from dist_infer.outputs import Failed
from dist_infer.startup import open_model, plan_run


class Host:
    """The model that is open, and what is asked of it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.llm: LLM | None = None
        self.tokens: list[list[int]] = []

    def open(self, config: dict[str, Any], streamed: bool) -> dict[str, Any]:
        if streamed:
            config["offload"]["host_memory"] = self.too_little(config)
        self.llm = LLM(config)
        units = self.llm.plan.ranks[0].units
        return {
            "units": [unit.name for unit in units],
            "streamed": [unit.name for unit in units if unit.tier == "nvme"],
            "store": self.llm.gang.executor._setup.store.directory,
        }

    def too_little(self, config: dict[str, Any]) -> int:
        """The least host memory, to 64 KiB, with which there is a plan."""

        def used(host_memory: int | str) -> int:
            loaded = load_config({**config, "offload": {**config["offload"], "host_memory": host_memory}})
            backend = make_backend(loaded.cluster, loaded.name)
            facts = backend.facts(with_devices=False, sample=None, dtype=None)
            plan = plan_run(loaded, open_model(loaded), facts, backend.footprint(1, 1))
            backend.close()
            return plan.budgets[0].used_bytes

        too_few, enough = 0, used("auto")
        while enough - too_few > 65536:
            middle = (too_few + enough) // 2
            try:
                used(middle)
                enough = middle
            except BudgetError:
                too_few = middle
        return enough

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self.tokens = [[] for _ in prompts]
        before = self.figures()
        error: Exception | None = None
        for index, event in self.llm.events([(None, prompt) for prompt in prompts], [params] * len(prompts)):
            if isinstance(event, TokenEvent):
                if not any(self.tokens):
                    self.connection.send_bytes(b'{"first": true}')
                self.tokens[index] += event.token_ids
            elif isinstance(event, Failed):
                error = event.error
        if error is not None:
            raise error
        self.llm.integrity()
        after = self.figures()
        counted = {
            name: after[name] - before[name]
            for name in ("num_read_retries", "num_slow_reads", "num_verified", "bytes_read")
        }
        return {"tokens": self.tokens, **counted, "longest_stall_s": after["longest_stall_s"]}

    def figures(self) -> dict[str, Any]:
        (stage,) = self.llm.gang.executor._host._stages
        return vars(stage._streamer.snapshot())

    def close(self) -> dict[str, Any]:
        if self.llm is not None:
            llm, self.llm = self.llm, None
            llm.close()
        return {}

    def serve(self) -> None:
        while True:
            order = json.loads(self.connection.recv_bytes())
            self.tokens = []
            try:
                answer = getattr(self, order.pop("do"))(**order)
            except DistInferError as error:
                answer = {
                    "error": type(error).__name__,
                    "text": str(error),
                    "exit_code": error.exit_code,
                    "tokens": self.tokens,
                }
            self.connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    with contextlib.suppress(EOFError):
        Host(Connection(int(sys.argv[1]))).serve()
