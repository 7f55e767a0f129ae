"""What is written down of one run, for those who ask for it by its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from dist_infer.messages import decode, encode
from launch.runs.process import ProcessId

FILE = "run.json"
# starting, ready, draining, drained: as the run says. ended, failed: it has said so. killed: it could not say so.
ACTIVE = ("starting", "ready", "degraded", "draining", "drained")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """started_s: seconds since 1970. address: of a Ray cluster that was there. home: of the Ray started for this run,
    with its sockets and its token. logs: where this machine's Ray writes. log: the run's own output, if detached.
    done of total: of what `detail` names. drain_s: what a drain may take. error, exit_code: how it ended."""

    name: str
    run_id: str
    kind: Literal["generate", "serve"]
    file: str
    version: str
    process: ProcessId
    started_s: float
    drain_s: float
    address: str | None = None
    home: str | None = None
    logs: str | None = None
    log: str | None = None
    phase: str = "starting"
    detail: str = ""
    done: int = 0
    total: int = 0
    url: str | None = None
    error: str = ""
    exit_code: int | None = None

    @property
    def is_alive(self) -> bool:
        """It has not ended, and its process is there."""
        return self.phase in ACTIVE and self.process.is_alive

    @property
    def state(self) -> str:
        """The phase, or `killed` for a run that has not ended and is there no more."""
        return "killed" if self.phase in ACTIVE and not self.process.is_alive else self.phase


def read_record(directory: Path) -> RunRecord | None:
    """None when nothing is written there, or nothing that can be read."""
    try:
        return decode(RunRecord, (directory / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def write_record(directory: Path, record: RunRecord) -> None:
    """Whole or not at all. Only the run's own process calls it."""
    beside = directory / f".{FILE}.{record.process.pid}"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(encode(record))
    beside.rename(directory / FILE)
