"""A real scrape: what it says is what was done, and the page says all of it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from observed import ALICE, PROMETHEUS, scrape_of, some_requests
from prometheus_client.parser import text_string_to_metric_families
from served_model import Served

from dist_infer import LLM
from dist_infer.messages import StreamReport
from dist_infer.metrics.exposition import CONTENT_TYPE
from dist_infer.metrics.scraped import read_scrape
from dist_infer.openai import service_metrics
from dist_infer.openai.service import Service
from dist_infer.serve_config import ServeLimits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_figures_are_those_of_what_was_done(served: Served, llm: LLM) -> None:
    """Guards every count: two requests, one with two answers of six tokens each, and one refusal."""
    before = read_scrape(scrape_of(served), 0.0)
    some_requests(served)
    after = read_scrape(scrape_of(served), 1.0)

    def grown(name: str, **labels: str) -> float:
        return after.sum(f"dist_infer_{name}", **labels) - before.sum(f"dist_infer_{name}", **labels)

    prompt = len(llm.encode("the sea and a ship"))
    assert grown("requests_total", end="finished") == 2
    assert grown("requests_total", end="failed") == after.sum("dist_infer_requests_waiting") == 0
    assert grown("generated_tokens_total") == 18
    assert grown("prompt_tokens_total") == 2 * prompt
    assert grown("http_requests_total", route="/v1/completions", status="200") == 2
    assert grown("http_requests_total", route="/metrics", status="200") == 1
    assert grown("http_requests_total", route="other", status="401") == 1
    assert grown("http_refused_total", reason="invalid_api_key") == 1
    assert after.sum("dist_infer_kv_blocks_free") == after.sum("dist_infer_kv_blocks") > 0
    assert after.labels("dist_infer_phase") == [{"phase": "ready"}]
    for name, count, total in (
        ("time_to_first_token_seconds", 2, None),
        ("inter_token_seconds", 15, None),  # three answers of six tokens
        ("request_seconds", 2, None),
        ("queue_seconds", 2, None),
        ("request_prompt_tokens", 2, 2 * prompt),
        ("request_output_tokens", 2, 18),
    ):
        buckets = after.buckets(f"dist_infer_{name}")
        assert [total for _, total in buckets] == sorted(total for _, total in buckets)
        assert buckets[-1][1] == after.sum(f"dist_infer_{name}_count")
        assert grown(f"{name}_count") == count, name
        assert total is None or grown(f"{name}_sum") == total
    assert 0 < grown("time_to_first_token_seconds_sum") < grown("request_seconds_sum")
    assert grown("inter_token_seconds_sum") > 0


def test_ranks_show_what_they_streamed(served: Served, llm: LLM) -> None:
    """Guards the ranks' figures: their own reports, each under its stage, and the plan's tiers."""
    reports: tuple[StreamReport, ...] = llm.stream_reports()
    assert len(reports) == 2
    busy_s = sum(report.busy_s for report in reports)
    found = read_scrape(scrape_of(served), 0.0)
    while found.sum("dist_infer_rank_busy_seconds_total") != pytest.approx(busy_s):  # it may be half a second old
        found = read_scrape(scrape_of(served), 0.0)
    for rank, report in zip(llm.plan.ranks, reports, strict=True):
        labels = {"stage": str(rank.stage), "rank": str(rank.rank)}
        assert found.sum("dist_infer_stream_read_bytes_total", **labels) == report.bytes_read > 0
        assert found.sum("dist_infer_rank_busy_seconds_total", **labels) == report.busy_s > 0
        assert found.sum("dist_infer_stream_passes_total", **labels) == report.num_passes
        assert found.sum("dist_infer_rank_tokens_total", **labels) == report.num_tokens
        for tier in ("device", "host", "nvme"):
            assert found.values("dist_infer_rank_weight_bytes", tier=tier, **labels) == [rank.bytes_in(tier)]
        assert found.sum("dist_infer_rank_units", **labels) == len(rank.units)
        (info,) = found.labels("dist_infer_rank_info", **labels)
        assert (info["host"], info["device"]) == (llm.worker_reports[rank.rank].host, "cpu")
        assert 0 <= found.sum("dist_infer_stage_overlap_ratio", stage=str(rank.stage)) <= 1
        bounds = found.labels("dist_infer_stage_bound_by", stage=str(rank.stage))
        assert len(bounds) == 1
    assert found.sum("dist_infer_rank_weight_bytes", tier="nvme") > 0


def test_page_names_every_metric_with_type_and_labels(scrape: str) -> None:
    """Guards docs/metrics.md, in both directions."""
    rows = re.findall(r"^\| `(dist_infer_\w+)` \| (\w+) \| ([a-z, ]*)\|", PAGE.read_text(encoding="utf-8"), re.M)
    documented = {name: (kind, {label.strip() for label in labels.split(",")} - {""}) for name, kind, labels in rows}
    found = {}
    for family in text_string_to_metric_families(scrape):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[family.name + ("_total" if family.type == "counter" else "")] = (family.type, labels)
    assert len(rows) == len(documented)
    assert documented == found


def test_a_metrics_key_opens_nothing_else(served: Served) -> None:
    """Guards the key that is given to a scraper: it neither asks the model nor lists it."""
    answer = httpx.get(f"{served.url}/metrics", headers=PROMETHEUS)
    assert (answer.status_code, answer.headers["content-type"]) == (200, CONTENT_TYPE)
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/openapi.json"), ("GET", "/x")):
        answer = httpx.request(method, served.url + path, headers=PROMETHEUS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "key_not_allowed")


def test_labels_stay_few(served: Served) -> None:
    """Guards memory and Prometheus against clients that make paths up."""
    with httpx.Client(base_url=served.url, headers=ALICE) as http:
        for number in range(20):
            http.get(f"/v1/made-up-{number}")
            http.get(f"/v1/models/made-up-{number}")
    text = scrape_of(served)
    assert "made-up" not in text
    found = read_scrape(text, 0.0)
    assert found.sum("dist_infer_http_requests_total", route="other", status="404") == 20
    assert found.sum("dist_infer_http_requests_total", route="/v1/models/{name:path}", status="404") == 20


@pytest.fixture
def loading() -> Iterator[Served]:
    made = Served(None, ServeLimits())
    yield made
    made.close()


def test_loading_is_seen(loading: Served) -> None:
    """Guards the scrape before there is an engine: phase and progress, counts at 0, no ranks."""
    loading.service.note_progress("packing", 3, 12)
    assert httpx.post(f"{loading.url}/v1/completions", json={"prompt": "x"}).status_code == 503
    found = read_scrape(httpx.get(f"{loading.url}/metrics").text, 0.0)
    assert found.labels("dist_infer_phase") == [{"phase": "loading"}]
    assert found.samples["dist_infer_load_progress_ratio"] == (({"step": "packing"}, 0.25),)
    assert found.values("dist_infer_steps_total") == [0]
    assert found.sum("dist_infer_http_refused_total", reason="loading") == 1
    assert "dist_infer_rank_info" not in found.samples


class LateRanks:
    """An engine whose ranks do not answer until they are let go."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self.is_late = llm, threading.Event()
        self.let_go = threading.Event()
        self.plan, self.worker_reports, self.stats, self.failure = llm.plan, llm.worker_reports, llm.stats, None
        self.state = llm.state

    def stream_reports(self) -> tuple[StreamReport, ...]:
        if self.is_late.is_set():
            assert self.let_go.wait(20)
        return self._llm.stream_reports()


async def test_late_ranks_hold_up_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the event loop and the scraper: what the ranks said before is shown, and one thread at most waits."""
    monkeypatch.setattr(service_metrics, "_PATIENCE_S", 0.01)
    monkeypatch.setattr("dist_infer.metrics.rank_watch.LEAST_S", 0.0)
    ranks: Any = LateRanks(llm)
    service = Service(model_name="tiny", limits=ServeLimits())
    service.metrics.watch(ranks)
    try:
        first = b""
        while b"dist_infer_rank_info{" not in first:  # within the test's own deadline
            first = await service.metrics.text()
        ranks.is_late.set()
        for text in await asyncio.gather(*(service.metrics.text() for _ in range(5))):
            assert b"dist_infer_rank_info{" in text
    finally:
        ranks.let_go.set()
        service.close()


async def test_ranks_that_fail_are_said_once(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """Guards the scrape of an engine that was lost: the last figures stay, and the log is not flooded."""
    ranks: Any = LateRanks(llm)
    service = Service(model_name="tiny", limits=ServeLimits())
    service.metrics.watch(ranks)
    assert b"dist_infer_rank_info{" in await service.metrics.text()
    ranks.stream_reports = lambda: 1 / 0
    for _ in range(3):
        service.metrics._watch._read_s = None  # due again
        assert b"dist_infer_rank_info{" in await service.metrics.text()
    service.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
