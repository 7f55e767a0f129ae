"""All that one scrape shows, as it stood when it was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dist_infer.engine.stats import EngineStats
from dist_infer.metrics.rank_watch import RankFigures
from dist_infer.metrics.request_times import RequestHistograms

Phase = Literal["loading", "ready", "degraded", "draining", "failed"]
PHASES: tuple[Phase, ...] = ("loading", "ready", "degraded", "draining", "failed")

NO_STATS = EngineStats(
    num_waiting=0,
    num_running=0,
    num_steps=0,
    num_preemptions=0,
    num_kv_blocks=0,
    num_free_kv_blocks=0,
    num_finished=0,
    num_aborted=0,
    num_failed=0,
    num_prompt_tokens=0,
    num_generated_tokens=0,
)
"""Of an engine that is not there yet."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What is running. Empty: not known yet."""

    version: str
    model: str
    executor: str = ""
    tensor: str = ""
    pipeline: str = ""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """progress: of the load's step, 0 to 1. answers: by (route, status). refused: by reason. Others as EngineStats."""

    build: Build
    start_s: float
    phase: Phase
    progress: tuple[str, float] | None
    num_open_answers: int
    num_waiting_prompt_tokens: int
    answers: Mapping[tuple[str, str], int]
    refused: Mapping[str, int]
    requests: RequestHistograms
    engine: EngineStats
    ranks: RankFigures | None
