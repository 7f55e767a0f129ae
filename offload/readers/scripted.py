"""A reader that misbehaves on order, for tests.

It fails, comes up short, is late, answers out of order, twice, with an error's number or never, where told to.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
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


@dataclass(frozen=True)
class ErrorNumber:
    """The reader hands out the kernel's negative errno as if it were a number of bytes; nothing was read."""

    number: int = errno.EIO


@dataclass(frozen=True)
class AfterOther:
    """The read is done right after submission number `other`, which is a later one."""

    other: int


@dataclass(frozen=True)
class Twice:
    """The read is done, and done once more with the next submission."""


Misbehaviour = Fail | Short | Late | Never | ErrorNumber | AfterOther | Twice


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
        self._held: dict[int, list[Callable[[], None]]] = {}  # by the submission that they wait for

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
        number = len(self.submissions)
        step = self._script.get(number)
        self.submissions.append(Submission(file, offset, length))
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()
        if before is not None:
            before()
        match step:
            case Late():
                timer = threading.Timer(step.delay_s, self._read, (future, file, offset, length, into))
                timer.daemon = True
                self._timers.append(timer)
                timer.start()
            case Fail():
                future.set_exception(read_failed(file, offset, length, 0, step.reason))
            case ErrorNumber():
                future.set_result(-step.number)
            case AfterOther():
                self._hold(step.other, lambda: self._read(future, file, offset, length, into))
            case Never():
                pass
            case _:
                self._read(future, file, offset, length, into[: step.num_bytes] if isinstance(step, Short) else into)
        if isinstance(step, Twice):
            self._hold(number + 1, lambda: _done_again(future, length))
        for act in self._held.pop(number, []):
            act()
        return future

    def close(self) -> None:
        """Waits for late reads, so that no thread outlives the reader."""
        self.closed = True
        for timer in self._timers:
            timer.join(timeout=10.0)

    def _hold(self, number: int, act: Callable[[], None]) -> None:
        self._held.setdefault(number, []).append(act)

    def _read(self, future: Future[int], file: ReadFile, offset: int, length: int, into: memoryview) -> None:
        try:
            with open(file.path, "rb", buffering=0) as source:
                source.seek(offset)
                got = source.readinto(into[:length]) if length else 0
        except OSError as error:
            future.set_exception(read_failed(file, offset, length, 0, str(error)))
        else:
            future.set_result(got or 0)


def _done_again(future: Future[int], length: int) -> None:
    """A future is done once: the second time must change nothing for who waited."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(length)
