"""The port at which the endpoint uses an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dist_infer.engine.stats import EngineStats
from dist_infer.gang_state import GangState
from dist_infer.grammar import Grammar
from dist_infer.openai.dialect import Described
from dist_infer.outputs import Event
from dist_infer.sampling_params import SamplingParams


class Engine(Described, Protocol):
    """What is served; `dist_infer.LLM` is one."""

    def submit(
        self,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
        *,
        priority: int = 0,
    ) -> str: ...
    def abort(self, request_id: str) -> bool: ...
    def check(self, ids: Sequence[int], params: SamplingParams) -> None: ...
    def knows_grammar(self, grammar: Grammar) -> bool: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> tuple[str, list[int]]: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def state(self) -> GangState: ...
    @property
    def failure(self) -> Exception | None: ...
