"""One OpenTelemetry span a request, sent by OTLP over HTTP. The extra `otel` has what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from dist_infer import __version__
from partition.errors import ConfigError

_TRACES = "/v1/traces"
_SEND_S = 3.0  # for one batch of spans, tries again included; what a dead collector can cost at the end
_SERVER_ERROR = 500


class RequestTracer:
    """Spans are sent in a thread of their own; what a collector does not take is dropped, and no request waits."""

    def __init__(self, endpoint: str, *, model: str) -> None:
        """endpoint: the collector's URL; without a path its usual one. ConfigError: no such extra, or no such URL."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"run.otlp_endpoint needs `pip install 'dist-infer[otel]'` ({error}); without the key nothing is traced"
            ) from error
        resource = Resource.create({"service.name": "dist-infer", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=_traces_url(endpoint), timeout=_SEND_S))
        )
        self._tracer = self._provider.get_tracer("dist_infer", __version__)
        self._parents = TraceContextTextMapPropagator()
        self._model = model

    def begin(self, headers: Mapping[str, str], method: str, request_id: str) -> RequestSpan:
        """A child of the caller's `traceparent`, if it sent one that can be read. headers: names in lower case."""
        from opentelemetry.trace import SpanKind

        given = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(method, context=self._parents.extract(given), kind=SpanKind.SERVER)
        span.set_attribute("http.request.method", method)
        span.set_attribute("dist_infer.request_id", request_id)
        span.set_attribute("gen_ai.request.model", self._model)
        return RequestSpan(span)

    def close(self) -> None:
        """Send what is left. May take some seconds with a collector that does not answer."""
        self._provider.shutdown()


class RequestSpan:
    """Of one request; `end` once."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def end(
        self,
        *,
        method: str,
        route: str,
        status: int,
        num_prompt_tokens: int,
        num_output_tokens: int,
        ttft_s: float | None,
    ) -> None:
        """status: 499 when the client had gone."""
        from opentelemetry.trace import Status, StatusCode

        span = self._span
        span.update_name(f"{method} {route}")
        span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        if num_prompt_tokens:
            span.set_attribute("gen_ai.usage.input_tokens", num_prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", num_output_tokens)
        if ttft_s is not None:
            span.set_attribute("gen_ai.server.time_to_first_token", ttft_s)
        if status >= _SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        span.end()


def _traces_url(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"run.otlp_endpoint: {endpoint!r} is no URL: write e.g. http://127.0.0.1:4318")
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + _TRACES
