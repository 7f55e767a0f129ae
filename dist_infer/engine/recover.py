"""The port at which the engine asks for other ranks when it has lost its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dist_infer.engine.executor import Executor
from dist_infer.engine.scheduler import SchedulerConfig
from partition.errors import ClusterError


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Ranks that have been started. scheduler: None where they have what those before had."""

    executor: Executor
    epoch: int
    step_timeout_s: float
    scheduler: SchedulerConfig | None = None


class Recover(Protocol):
    def __call__(self, error: ClusterError) -> Recovered:
        """End what is left of the ranks that were lost, and bring up others. Takes as long as a start does.

        Called by the engine's thread. Raises when it cannot be done; the engine then fails with both causes.
        """
        ...

    def cancel(self) -> None:
        """A call that is under way, and each later one, raises soon. Any thread; idempotent; waits for seconds."""
        ...
