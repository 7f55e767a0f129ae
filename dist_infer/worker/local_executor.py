"""The executor without Ray for several tensor ranks: one child process for each, with every stage.

Implements the port `dist_infer.engine.executor.Executor` (structurally: worker and engine do not import each other).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from dist_infer.gang_state import Connecting, Loading, Step
from dist_infer.heartbeat import Heartbeat
from dist_infer.messages import StepPlan, StepResult, StreamReport, TimelineReport, WorkerReport, decode, encode
from dist_infer.worker.child import HEARTBEAT, STREAM_REPORTS, TIMELINES, pack_frame, unpack_frame
from dist_infer.worker.oom_watch import OomWatch
from dist_infer.worker.setup import WorkerSetup
from partition.errors import ClusterError, WorkerError

OnStep = Callable[[Step], None]
OnLoss = Callable[[ClusterError], None]
_Report = TypeVar("_Report", StreamReport, TimelineReport)
_log = logging.getLogger(__name__)
_REPORT_TIMEOUT_S = 30.0
_LEAVE_S = 2.0  # for a child to end when it is asked to
_KILLED_S = 5.0  # and when it is killed: much memory takes the kernel a while
_NOTICE_S = 0.5  # a rank that is killed is often noticed by its peers first, as a lost connection
_CLOSED = "the executor was closed"


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection  # set-up and steps: the engine's thread alone
    control: Connection  # figures: any thread, one at a time
    heart: Connection  # whether it is there: the heartbeat's thread alone
    tp_rank: int
    is_asked: bool = False  # on `heart`, and has not answered
    is_silent: bool = False  # and was killed for it
    owed: deque[bytes] = field(default_factory=deque)  # what it was asked on `control` and has not answered
    known: dict[bytes, bytes] = field(default_factory=dict)  # its last answer to each question


class SpawnedExecutor:
    """One child process per tensor rank, each with every stage. Steps are answered by all children."""

    def __init__(
        self,
        setups: Sequence[WorkerSetup],
        *,
        start_timeout_s: float,
        heartbeat_timeout_s: float,
        on_step: OnStep,
    ) -> None:
        self._setups, self._start_timeout_s, self._on_step = tuple(setups), start_timeout_s, on_step
        self._children: list[_Child] = []
        self._in_flight: deque[int] = deque()
        self._asking = threading.Lock()
        self._memory = OomWatch()
        self._silence_s = heartbeat_timeout_s
        self._heartbeat = Heartbeat(self._ask_hearts, self._end_silent, timeout_s=heartbeat_timeout_s)
        self._ending = threading.Lock()  # guards the next, and who is in _children when it turns true
        self._closed = False
        self._is_well = False  # started, and nothing has gone wrong since

    def start(self) -> tuple[WorkerReport, ...]:
        deadline = time.monotonic() + self._start_timeout_s
        for tp_rank, setup in enumerate(self._setups):
            with self._ending:
                if self._closed:
                    raise ClusterError(_CLOSED)
                self._children.append(_spawn(tp_rank, setup.threads))
        children = self._children  # `close` in another thread puts an empty list in its place
        for child, setup in zip(children, self._setups, strict=True):
            self._tell(child, pack_frame("setup", encode(setup)))
        self._answers(deadline, children)
        if len(children) > 1:
            self._on_step(Connecting())
            self._tell(children[0], pack_frame("bind"))
            port = self._answers(deadline, children[:1])[0][0]["port"]
            for child in children:
                self._tell(child, pack_frame("connect", port=port))
            self._answers(deadline, children)
        for child in children:
            self._tell(child, pack_frame("load"))
        bodies = [body for _, body in self._answers(deadline, children)]
        reports = [decode(WorkerReport, text.encode()) for body in bodies for text in json.loads(body)]
        self._is_well = True
        return tuple(sorted(reports, key=lambda report: report.rank))

    def watch(self, on_loss: OnLoss) -> None:
        with self._ending:
            if not self._closed:
                self._heartbeat.start(on_loss)

    def submit(self, plan: StepPlan) -> None:
        data = pack_frame("step", encode(plan))
        for child in self._children:
            self._tell(child, data)
        self._in_flight.append(plan.step_id)

    def collect(self, timeout_s: float) -> StepResult:
        children = self._children
        if not self._in_flight or not children:
            raise ClusterError(_CLOSED)
        try:
            answers = self._answers(time.monotonic() + timeout_s, children)
        except ClusterError:
            self._is_well = False
            raise
        self._in_flight.popleft()
        return decode(StepResult, next(body for _, body in answers if body))

    def stream_reports(self, timeout_s: float = _REPORT_TIMEOUT_S) -> tuple[StreamReport, ...]:
        self._ask(STREAM_REPORTS, timeout_s)
        return self._reports(StreamReport, STREAM_REPORTS)

    def timelines(self) -> tuple[TimelineReport, ...]:
        """ClusterError when one does not come: what it says is said once."""
        if late := self._ask(TIMELINES, _REPORT_TIMEOUT_S):
            raise ClusterError(f"no report from tensor rank {late} in {_REPORT_TIMEOUT_S:.0f} s")
        return self._reports(TimelineReport, TIMELINES)

    def close(self) -> None:
        """Ends the children: a message asks, a kill after two seconds insists. A `collect` elsewhere sees them go.

        Children that are starting, or have lost one of them, hear no message: they are killed.
        """
        with self._ending:
            if self._closed:
                return
            self._closed = True
        self._heartbeat.stop()
        deadline = time.monotonic() + (_LEAVE_S if self._is_well else 0.0)
        for child in self._children:
            if not self._is_well:
                child.process.kill()
                continue
            with contextlib.suppress(OSError):
                child.connection.send_bytes(pack_frame("close"))
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            child.process.kill()
        deadline = time.monotonic() + _KILLED_S
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:  # the kernel holds it, in a read of a disk that is gone, say
                _log.warning("process %d is killed and does not end: its memory is not free", child.process.pid)
            child.connection.close()
        self._heartbeat.join()
        with self._asking:  # who asks has seen them go
            for child in self._children:
                child.control.close()
                child.heart.close()
            self._children = []

    def _ask_hearts(self, timeout_s: float) -> list[int]:
        """See `Heartbeat`. One question to a child at a time, so that none of them can ever block us."""
        deadline = time.monotonic() + timeout_s
        waiting = {child.heart: child for child in self._children}
        for child in self._children:
            if not child.is_asked:
                with contextlib.suppress(OSError):  # then its end is heard below
                    child.heart.send_bytes(HEARTBEAT)
                child.is_asked = True
        while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
            for heart in ready:
                child = waiting.pop(heart)  # type: ignore[call-overload]
                try:
                    child.heart.recv_bytes()
                except (EOFError, OSError):
                    raise self._death(child) from None
                child.is_asked = False
        return [child.tp_rank for child in waiting.values()]

    def _end_silent(self, tp_ranks: Sequence[int]) -> WorkerError:
        """A stopped process can be killed, and whoever waits for it in a collective or a `collect` then knows."""
        silent = [child for child in self._children if child.tp_rank in tp_ranks]
        for child in silent:
            child.is_silent = True
            child.process.kill()
        return self._death(silent[0])

    def _ask(self, wanted: bytes, timeout_s: float) -> list[int]:
        """Ask every child, also while a step runs; what comes in time goes into `known`. Returns who is late.

        An answer that comes late is taken in by whoever asks next, so it never passes for one to another question; a
        child that owes this answer already is not asked again.
        """
        deadline = time.monotonic() + timeout_s
        if not self._asking.acquire(timeout=timeout_s):
            return [child.tp_rank for child in self._children]
        try:
            for child in self._children:
                if wanted not in child.owed:
                    try:
                        child.control.send_bytes(wanted)
                    except OSError:
                        raise self._death(child) from None
                    child.owed.append(wanted)
            return [child.tp_rank for child in self._children if not self._take_answers(child, wanted, deadline)]
        finally:
            self._asking.release()

    def _take_answers(self, child: _Child, wanted: bytes, deadline: float) -> bool:
        """Answers come in the order of the questions. False at the deadline, if the wanted one has not come."""
        while wanted in child.owed:
            try:
                if not child.control.poll(max(0.0, deadline - time.monotonic())):
                    return False
                child.known[child.owed[0]] = child.control.recv_bytes()
            except (EOFError, OSError):
                raise self._death(child) from None
            child.owed.popleft()
        return True

    def _reports(self, kind: type[_Report], wanted: bytes) -> tuple[_Report, ...]:
        """The last that are known, by rank."""
        answers = [child.known[wanted] for child in self._children if wanted in child.known]
        found = [decode(kind, text.encode()) for answer in answers for text in json.loads(answer)]
        return tuple(sorted(found, key=lambda report: report.rank))

    def _answers(self, deadline: float, children: Sequence[_Child]) -> list[tuple[dict[str, object], bytes]]:
        """One answer from each child, in their order. An error or a death of any ends the wait at once."""
        waiting = {child.connection: child for child in children}
        answers: dict[int, tuple[dict[str, object], bytes]] = {}
        while waiting:
            try:
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            except OSError:
                raise ClusterError(_CLOSED) from None
            if not ready:
                missing = ", ".join(str(child.tp_rank) for child in waiting.values())
                raise ClusterError(f"no answer from tensor rank {missing} before the deadline")
            for connection in ready:
                child = waiting[connection]  # type: ignore[index]
                try:
                    fields, body = unpack_frame(child.connection.recv_bytes())
                except (EOFError, OSError):
                    raise self._death(child) from None
                if fields["kind"] == "error":
                    print(body.decode(), file=sys.stderr)
                    raise self._cause(child, str(fields["message"]))
                if fields["kind"] == "progress":
                    if child.tp_rank == 0:
                        self._on_step(Loading(done=int(str(fields["done"])), total=int(str(fields["total"]))))
                    continue
                answers[child.tp_rank] = (fields, body)
                del waiting[child.connection]
        return [answers[rank] for rank in sorted(answers)]

    def _tell(self, child: _Child, frame: bytes) -> None:
        try:
            child.connection.send_bytes(frame)
        except OSError:
            raise self._death(child) from None

    def _cause(self, child: _Child, message: str) -> WorkerError:
        """Of an error that a child reports: the death of another one, if there is one."""
        deadline = time.monotonic() + _NOTICE_S
        for other in self._children:
            if other is child:
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.process.wait(max(0.0, deadline - time.monotonic()))
                return self._death(other)
        words = f"tensor rank {child.tp_rank}: {message}{self._memory.explain()}"
        return WorkerError(words, rank=child.tp_rank)

    def _death(self, child: _Child) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(1)
        if child.is_silent:
            words = f"has not answered for {self._silence_s:g} s and was killed (cluster.heartbeat_timeout)"
            return WorkerError(f"tensor rank {child.tp_rank} (pid {child.process.pid}) {words}", rank=child.tp_rank)
        code = child.process.poll()
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        how += self._memory.explain() if code == -signal.SIGKILL else ""
        return WorkerError(f"tensor rank {child.tp_rank} (pid {child.process.pid}) {how}", rank=child.tp_rank)


def _spawn(tp_rank: int, threads: int) -> _Child:
    """A fresh interpreter on this one's import path; no fork (threads), no re-import of the user's main module."""
    pairs = [socket.socketpair() for _ in range(3)]
    fds = [theirs.fileno() for _, theirs in pairs]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_infer.worker.child", *map(str, fds)],
            pass_fds=fds,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    finally:
        for _, theirs in pairs:
            theirs.close()
    connection, control, heart = (Connection(ours.detach()) for ours, _ in pairs)
    return _Child(process, connection, control, heart, tp_rank)
