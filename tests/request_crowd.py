"""Many requests at once on one model, for faults to happen under; and that each came to its end as it should."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_infer import LLM, SamplingParams
from dist_infer.outputs import Event, Failed, Finished, TokenEvent

WAIT_S = 120.0  # a hang is a failure; nothing waits for it otherwise
PROMPTS = [[(7 * i + 3 * k) % 150 + 5 for i in range(3 + 4 * k)] for k in range(8)]
NUM_TOKENS = 120
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)


def run_config(model: Path, store: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Room for half of PROMPTS at a time. A step may take so long that only a heartbeat finds a silent rank."""
    config: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "offload": {"store": str(store)},
        "engine": {
            "kv_memory": "1 MiB",
            "block_tokens": 4,
            "max_batch_tokens": 16,
            "max_requests": 4,
            "max_model_len": 200,
            "step_timeout": "10 min",
        },
        "cluster": {"device": "cpu", "max_restarts": 20},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    return config


class Crowd:
    """PROMPTS, submitted and under way: `end` waits for all."""

    def __init__(self, llm: LLM, params: SamplingParams = PARAMS, *, prompts: Sequence[list[int]] = PROMPTS) -> None:
        self.has_begun = threading.Event()  # every request that runs has some tokens
        self._is_over = threading.Event()
        self._events: list[list[Event]] = [[] for _ in prompts]
        self._num_open = len(prompts)
        for index, prompt in enumerate(prompts):
            llm.submit(None, prompt, params, lambda event, index=index: self._take(index, event))  # type: ignore[misc]

    def _take(self, index: int, event: Event) -> None:
        """Called by the engine's thread alone."""
        self._events[index].append(event)
        if isinstance(event, Finished | Failed):
            self._num_open -= 1
            if not self._num_open:
                self._is_over.set()
        if sum(len(events) for events in self._events) > NUM_TOKENS:
            self.has_begun.set()

    def ends(self) -> list[Finished | Failed]:
        """Of each, after it has come."""
        assert self._is_over.wait(WAIT_S), "not all came to an end"
        found = []
        for events in self._events:
            ends = [event for event in events if isinstance(event, Finished | Failed)]
            assert len(ends) == 1
            assert events[-1] is ends[0]
            found += ends
        return found

    def tokens(self) -> list[list[int]]:
        """Of each, as its events gave them; no request failed."""
        errors = [end.error for end in self.ends() if isinstance(end, Failed)]
        assert not errors, errors
        return [
            [token for event in events if isinstance(event, TokenEvent) for token in event.token_ids]
            for events in self._events
        ]
