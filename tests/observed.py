"""Keys, requests and scrapes for tests of what a served model says of itself."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
from served_model import Served

from dist_infer.openai.keys import ApiKey

KEY = "sk-0123456789abcdef"
METRICS_KEY = "sk-metrics-0123456789"
KEYS = (
    ApiKey(name="alice", sha256=hashlib.sha256(KEY.encode()).hexdigest()),
    ApiKey(name="prometheus", sha256=hashlib.sha256(METRICS_KEY.encode()).hexdigest(), only_metrics=True),
)
ALICE = {"authorization": f"Bearer {KEY}"}
PROMETHEUS = {"authorization": f"Bearer {METRICS_KEY}"}
ASK: dict[str, Any] = {"prompt": "the sea and a ship", "max_tokens": 6, "ignore_eos": True, "temperature": 0}


def some_requests(served: Served) -> None:
    """One answered, one streamed with two answers, one refused."""
    with httpx.Client(base_url=served.url, headers=ALICE, timeout=20) as http:
        assert http.post("/v1/completions", json=ASK).status_code == 200
        assert "[DONE]" in http.post("/v1/completions", json={**ASK, "stream": True, "n": 2}).text
        assert http.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401


def scrape_of(served: Served) -> str:
    answer = httpx.get(f"{served.url}/metrics", headers=PROMETHEUS, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.text
