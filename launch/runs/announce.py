"""What a detached run tells the command that started it: lines of JSON through a pipe, until it is ready or ends."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from types import TracebackType

from dist_infer.messages import encode
from partition.errors import DistInferError

ENVIRONMENT = "DIST_INFER_ANNOUNCE"  # the pipe's descriptor and the path of the log, in a detached run's environment


@dataclass(frozen=True, kw_only=True)
class Notice:
    """phase, detail, done, total, url: as in RunRecord. error, exit_code: once it has failed or been refused."""

    phase: str
    detail: str = ""
    done: int = 0
    total: int = 0
    url: str | None = None
    error: str = ""
    exit_code: int | None = None


class Announcer:
    """A context: this process's end of the pipe. An error that leaves it is said before it goes on.

    log: where this process's output goes; None for a run that is not detached.
    """

    def __init__(self, descriptor: int | None, log: str | None) -> None:
        self._descriptor = descriptor
        self.log = log

    def __enter__(self) -> Announcer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DistInferError):
            self.say(Notice(phase="failed", error=str(error), exit_code=error.exit_code))
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @classmethod
    def from_environment(cls) -> Announcer:
        """Taken out of the environment, so that nothing this process starts takes itself for the run."""
        descriptor, _, log = os.environ.pop(ENVIRONMENT, "").partition(":")
        if not descriptor:
            return cls(None, None)
        os.set_inheritable(int(descriptor), False)
        return cls(int(descriptor), log)

    @property
    def is_detached(self) -> bool:
        return self.log is not None

    def say(self, notice: Notice) -> None:
        """Nothing where nobody listens any more: the run is not the worse for it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, encode(notice) + b"\n")
