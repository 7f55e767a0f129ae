"""A reader that misbehaves on order, for tests: it fails, comes up short, is late or never answers, where told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from offload.readers.port import ReadFile, read_failed


@dataclass(frozen=True)
class Fail:
    """The read ends in an error."""

    reason: str = "Input/output error"


@dataclass(frozen=True)
class Short:
    """Only `num_bytes` arrive, and the reader claims that this was the whole read."""

    num_bytes: int


@dataclass(frozen=True)
class Late:
    """The read is done `delay_s` seconds after it was submitted."""

    delay_s: float


@dataclass(frozen=True)
class Never:
    """The read is never done, and cannot be cancelled."""


Misbehaviour = Fail | Short | Late | Never


@dataclass(frozen=True)
class Submission:
    """What was asked for."""

    file: ReadFile
    offset: int
    length: int


class ScriptedReader:
    """Reads at once on the submitting thread, except where `script` (submission number, from 0) says otherwise.

    `submissions` lists everything asked for, in order.
    """

    def __init__(self, script: Mapping[int, Misbehaviour] | None = None) -> None:
        self.submissions: list[Submission] = []
        self.closed = False
        self._script = dict(script or {})
        self._timers: list[threading.Timer] = []

    @property
    def name(self) -> str:
        return "scripted"

    @property
    def direct(self) -> bool:
        return False

    @property
    def num_retries(self) -> int:
        return 0

    def submit(
        self,
        file: ReadFile,
        offset: int,
        length: int,
        into: memoryview,
        before: Callable[[], None] | None = None,
    ) -> Future[int]:
        """See Reader.submit."""
        step = self._script.get(len(self.submissions))
        self.submissions.append(Submission(file, offset, length))
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()
        if before is not None:
            before()
        if isinstance(step, Late):
            timer = threading.Timer(step.delay_s, self._read, (future, file, offset, length, into))
            timer.daemon = True
            self._timers.append(timer)
            timer.start()
        elif isinstance(step, Fail):
            future.set_exception(read_failed(file, offset, length, 0, step.reason))
        elif not isinstance(step, Never):
            self._read(future, file, offset, length, into[: step.num_bytes] if isinstance(step, Short) else into)
        return future

    def close(self) -> None:
        """Waits for late reads, so that no thread outlives the reader."""
        self.closed = True
        for timer in self._timers:
            timer.join(timeout=10.0)

    def _read(self, future: Future[int], file: ReadFile, offset: int, length: int, into: memoryview) -> None:
        try:
            with open(file.path, "rb", buffering=0) as source:
                source.seek(offset)
                got = source.readinto(into[:length]) if length else 0
        except OSError as error:
            future.set_exception(read_failed(file, offset, length, 0, str(error)))
        else:
            future.set_result(got or 0)
