"""Spans as a collector gets them, from a receiver that speaks OTLP over HTTP."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from observed import ALICE, ASK, KEYS
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from served_model import Served

from dist_infer import LLM
from dist_infer.errors import ConfigError
from dist_infer.openai.tracing import RequestTracer
from dist_infer.serve_config import ServeLimits

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                outer.requests.append((self.path, data))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """The test's output is no log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def spans(self) -> list[Any]:
        found = []
        for path, data in self.requests:
            assert path == "/v1/traces"
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def attributes(span: Any) -> dict[str, Any]:
    found = {}
    for each in span.attributes:
        found[each.key] = getattr(each.value, each.value.WhichOneof("value"))
    return found


def test_one_span_a_request(llm: LLM, collector: Collector) -> None:
    """Guards names, attributes, the caller's trace, and that probes and scrapes have no span."""
    tracer = RequestTracer(collector.url, model="tiny")
    served = Served(llm, ServeLimits(), KEYS, tracer=tracer)
    headers = {**ALICE, "x-request-id": "r1", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    httpx.post(f"{served.url}/v1/completions", json={**ASK, "stream": True}, headers=headers, timeout=20)
    httpx.get(f"{served.url}/v1/nothing", headers={**ALICE, "traceparent": "junk"})
    httpx.get(f"{served.url}/v1/models")
    for path in ("/health/live", "/health/ready", "/metrics"):
        httpx.get(served.url + path, headers=ALICE)
    served.close()
    tracer.close()
    answered, unknown, refused = collector.spans()
    assert answered.name == "POST /v1/completions"
    assert (answered.trace_id.hex(), answered.parent_span_id.hex()) == (TRACE, PARENT)
    found = attributes(answered)
    ttft_s = found.pop("gen_ai.server.time_to_first_token")
    assert 0 < ttft_s < (answered.end_time_unix_nano - answered.start_time_unix_nano) / 1e9
    assert found == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "dist_infer.request_id": "r1",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": len(llm.encode(ASK["prompt"])),
        "gen_ai.usage.output_tokens": 6,
    }
    assert (unknown.name, attributes(unknown)["http.response.status_code"]) == ("GET other", 404)
    assert unknown.trace_id.hex() != TRACE
    assert not unknown.parent_span_id
    assert attributes(refused)["http.response.status_code"] == 401
    assert "gen_ai.usage.input_tokens" not in attributes(refused)


def test_a_collector_that_is_gone_costs_no_request(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """Guards requests against tracing: they are answered, and closing ends."""
    tracer = RequestTracer("http://127.0.0.1:9", model="tiny")
    served = Served(llm, ServeLimits(), tracer=tracer)
    assert httpx.post(f"{served.url}/v1/completions", json=ASK, timeout=20).status_code == 200
    served.close()
    tracer.close()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the start without the extra, and with what is no URL."""
    with pytest.raises(ConfigError, match=r"run\.otlp_endpoint: 'collector:4318' is no URL"):
        RequestTracer("collector:4318", model="tiny")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"dist-infer\[otel\]"):
        RequestTracer("http://127.0.0.1:4318", model="tiny")
