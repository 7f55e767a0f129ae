"""A snapshot as Prometheus text. Its names are a contract: docs/metrics.md, dashboard, page and `top` use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dist_infer.metrics.histogram import Histogram
from dist_infer.metrics.rank_exposition import rank_families
from dist_infer.metrics.snapshot import PHASES, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exposition(Collector):
    """`text` takes a snapshot and writes it down; any thread."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take
        self._registry = CollectorRegistry()  # of its own: nothing that others register gets in
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing at registration: there is no snapshot yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        seen = self._take()
        yield from _service(seen)
        yield from _engine(seen)
        yield from _requests(seen)
        if seen.ranks is not None:
            yield from rank_families(seen.ranks)

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _service(seen: Snapshot) -> Iterator[Metric]:
    phase = GaugeMetricFamily("dist_infer_phase", "1 for the phase it is in", labels=["phase"])
    for name in PHASES:
        phase.add_metric([name], float(name == seen.phase))
    yield phase
    progress = GaugeMetricFamily(
        "dist_infer_load_progress_ratio", "How far the step of loading that is under way is", labels=["step"]
    )
    if seen.progress is not None:
        progress.add_metric([seen.progress[0]], seen.progress[1])
    yield progress
    yield _gauge("dist_infer_start_time_seconds", "When this process began to serve, since 1970", seen.start_s)
    build = asdict(seen.build)
    info = GaugeMetricFamily("dist_infer_build_info", "What is running; always 1", labels=list(build))
    info.add_metric(list(build.values()), 1)
    yield info
    yield _gauge(
        "dist_infer_http_open_answers", "Answers that were admitted and have no end yet", seen.num_open_answers
    )
    yield _gauge(
        "dist_infer_http_waiting_prompt_tokens",
        "Prompt tokens of requests without a first token",
        seen.num_waiting_prompt_tokens,
    )
    answers = CounterMetricFamily(
        "dist_infer_http_requests", "HTTP requests that were answered", labels=["route", "status"]
    )
    for (route, status), count in sorted(dict(seen.answers).items()):
        answers.add_metric([route, status], count)
    yield answers
    yield _counters("dist_infer_http_refused", "HTTP requests that were not let in", "reason", seen.refused)


def _engine(seen: Snapshot) -> Iterator[Metric]:
    stats = seen.engine
    yield _gauge("dist_infer_requests_waiting", "Requests in the engine's queue", stats.num_waiting)
    yield _gauge("dist_infer_requests_running", "Requests that own KV blocks", stats.num_running)
    yield _gauge("dist_infer_kv_blocks", "KV blocks there are", stats.num_kv_blocks)
    yield _gauge("dist_infer_kv_blocks_free", "KV blocks that nobody owns", stats.num_free_kv_blocks)
    used = 1 - stats.num_free_kv_blocks / stats.num_kv_blocks if stats.num_kv_blocks else 0.0
    yield _gauge("dist_infer_kv_used_ratio", "Share of the KV blocks that are owned", used)
    for name, words, count in (
        ("steps", "Steps of the engine: passes over the weights", stats.num_steps),
        ("preemptions", "Requests that lost their KV blocks and began again", stats.num_preemptions),
        ("prompt_tokens", "Prompt tokens of requests that were taken in", stats.num_prompt_tokens),
        ("generated_tokens", "Tokens that were sampled", stats.num_generated_tokens),
        ("gang_restarts", "Gangs of ranks that were replaced", stats.num_gang_restarts),
    ):
        yield CounterMetricFamily(f"dist_infer_{name}", words, value=count)
    ends = {"finished": stats.num_finished, "aborted": stats.num_aborted, "failed": stats.num_failed}
    yield _counters("dist_infer_requests", "Requests of the engine by how they ended", "end", ends)


def _requests(seen: Snapshot) -> Iterator[Metric]:
    found = seen.requests
    for name, words, histogram in (
        ("time_to_first_token_seconds", "From a request's admission to its first token", found.ttft),
        ("inter_token_seconds", "Between tokens of an answer", found.inter_token),
        ("request_seconds", "From a request's admission to its last token", found.whole),
        ("queue_seconds", "From a request's arrival at the engine to its first step", found.queue),
        ("request_prompt_tokens", "Prompt tokens of a request", found.prompt_tokens),
        ("request_output_tokens", "Tokens of all answers to a request", found.output_tokens),
    ):
        yield _histogram(f"dist_infer_{name}", words, histogram)


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(name, words, value=value)


def _counters(name: str, words: str, label: str, counts: Mapping[str, int]) -> Metric:
    found = CounterMetricFamily(name, words, labels=[label])
    for value, count in sorted(dict(counts).items()):  # a copy: another thread may add a key meanwhile
        found.add_metric([value], count)
    return found


def _histogram(name: str, words: str, histogram: Histogram) -> Metric:
    buckets = [("+Inf" if math.isinf(bound) else repr(bound), total) for bound, total in histogram.buckets()]
    return HistogramMetricFamily(name, words, buckets=buckets, sum_value=histogram.sum)
