"""How the endpoint stands: loading, ready, degraded, draining or failed, each with what is known then."""

from __future__ import annotations

from dataclasses import dataclass, field

from dist_infer.openai.dialect import Dialect
from dist_infer.openai.port import Engine


@dataclass(frozen=True, kw_only=True)
class Loading:
    """done of total; total 0: unknown."""

    phase: str = "starting"
    done: int = 0
    total: int = 0


@dataclass(frozen=True, kw_only=True)
class Ready:
    engine: Engine
    max_requests: int
    max_model_len: int
    dialect: Dialect = field(default_factory=Dialect)


@dataclass(frozen=True, kw_only=True)
class Degraded:
    """Ranks are being replaced: requests are taken in and wait, streams pause. detail: how far that is, for people."""

    ready: Ready
    detail: str


@dataclass(frozen=True, kw_only=True)
class Draining:
    ready: Ready | None


@dataclass(frozen=True, kw_only=True)
class Failed:
    error: Exception


State = Loading | Ready | Degraded | Draining | Failed
