"""Readiness of an engine that nobody asks: FAULTS' rule that all ranks were heard from lately."""

from __future__ import annotations

from typing import Any

import httpx
import psutil
from served_model import Served, wait_until

from dist_infer import LLM
from dist_infer.serve_config import ServeLimits


def _status(served: Served) -> int:
    return httpx.get(f"{served.url}/health/ready", timeout=20).status_code


def test_a_rank_lost_while_idle_is_found_by_the_probe(run_config: dict[str, Any]) -> None:
    """Guards against a replica that says it is ready until its first user finds out."""
    with LLM({**run_config, "parallel": {"tensor": 2}}) as llm:
        served = Served(llm, ServeLimits(), canary_s=0.0)
        try:
            assert _status(served) == 200
            wait_until(lambda: llm.stats.num_finished == 1)  # the canary: it has an end like any request
            rank = next(child for child in psutil.Process().children() if "dist_infer.worker.child" in child.cmdline())
            rank.kill()
            wait_until(lambda: _status(served) == 503)
        finally:
            served.close()


def test_an_engine_at_work_is_not_asked(llm: LLM) -> None:
    """Guards against probes that take places and tokens of requests."""
    served = Served(llm, ServeLimits(), canary_s=3600.0)
    try:
        before = llm.stats
        assert [_status(served) for _ in range(3)] == [200] * 3
        assert llm.stats == before
    finally:
        served.close()
