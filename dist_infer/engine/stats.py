"""What the engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """As of the engine's last step. `num_waiting` were admitted to the queue, `num_running` own KV blocks.

    `num_gang_restarts`: gangs of ranks that took the place of one that was lost.
    """

    num_waiting: int
    num_running: int
    num_steps: int
    num_preemptions: int
    num_kv_blocks: int
    num_free_kv_blocks: int
    num_finished: int
    num_aborted: int
    num_failed: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_gang_restarts: int = 0
