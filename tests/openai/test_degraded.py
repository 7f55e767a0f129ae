"""While ranks are replaced: not ready, but nobody is turned away, and a stream goes on where it was."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served_model import Served, wait_until

from dist_infer import LLM
from dist_infer.gang import Gang
from dist_infer.metrics.scraped import read_scrape
from dist_infer.model.adapter import StageModel
from dist_infer.serve_config import ServeLimits

BODY: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def served(run_config: dict[str, Any]) -> Iterator[Served]:
    """With an engine of its own, to be hurt."""
    with LLM(run_config) as llm:
        made = Served(llm, ServeLimits())
        yield made
        made.close()


def test_requests_wait_and_streams_pause(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards clients against a loss they cannot do anything about, and a balancer against one it can."""
    replace, layer = Gang.replace, StageModel.layer
    is_replacing, may_go_on, fails = threading.Event(), threading.Event(), threading.Event()

    def held(self: Gang, epoch: int) -> str:
        is_replacing.set()
        assert may_go_on.wait(60)
        return replace(self, epoch)

    def failing(self: StageModel, *arguments: Any) -> Any:
        if fails.is_set():
            fails.clear()
            raise RuntimeError("planted, with words for no client")
        return layer(self, *arguments)

    monkeypatch.setattr(Gang, "replace", held)
    monkeypatch.setattr(StageModel, "layer", failing)
    with httpx.Client(base_url=served.url, timeout=60) as http:
        expected = http.post("/v1/completions", json=BODY).json()["choices"]
        late: dict[str, Any] = {}
        waiting = threading.Thread(
            target=lambda: late.update(httpx.post(f"{served.url}/v1/completions", json=BODY, timeout=60).json())
        )
        with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as stream:
            lines = stream.iter_lines()
            got = [next(lines)]
            fails.set()
            assert is_replacing.wait(20)
            ready = httpx.get(f"{served.url}/health/ready")
            assert (ready.status_code, ready.json()) == (503, {"status": "degraded", "phase": "degraded"})
            assert httpx.get(f"{served.url}/health/startup").status_code == 200
            assert httpx.get(f"{served.url}/health/live").status_code == 200
            waiting.start()
            wait_until(lambda: served.service.num_open == 2)
            assert read_scrape(httpx.get(f"{served.url}/metrics").text, 0.0).values(
                "dist_infer_phase", phase="degraded"
            ) == [1.0]
            may_go_on.set()
            got += lines
        waiting.join(60)
    chunks = [json.loads(line[6:]) for line in got if line.startswith("data: {")]
    assert "error" not in chunks[-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == expected[0]["text"]
    assert late["choices"] == expected
    assert httpx.get(f"{served.url}/health/ready").status_code == 200
    scrape = read_scrape(httpx.get(f"{served.url}/metrics").text, 0.0)
    assert scrape.sum("dist_infer_gang_restarts_total") == 1
    assert scrape.values("dist_infer_phase", phase="ready") == [1.0]
