"""The engine's counts as Prometheus text, where nothing better is installed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_infer.openai.service import Service

_GAUGES = frozenset({"num_waiting", "num_running", "num_kv_blocks", "num_free_kv_blocks"})


def plain_metrics(service: Service) -> bytes:
    """`EngineStats` by their names, and what the door counts."""
    values: dict[str, tuple[str, int]] = {
        "http_open_answers": ("gauge", service.num_open),
        "http_refused_total": ("counter", service.num_refused),
        "http_waiting_prompt_tokens": ("gauge", service.num_waiting_tokens),
    }
    ready = getattr(service.state, "ready", service.state)
    engine = getattr(ready, "engine", None)
    if engine is not None:
        for name, value in asdict(engine.stats).items():
            kind, end = ("gauge", "") if name in _GAUGES else ("counter", "_total")
            values[f"engine_{name.removeprefix('num_')}{end}"] = (kind, value)
    lines = []
    for name, (kind, value) in values.items():
        lines += [f"# TYPE dist_infer_{name} {kind}", f"dist_infer_{name} {value}"]
    return ("\n".join(lines) + "\n").encode()
