"""The executor without Ray: all stages in this process; with tensor parallelism one child process per tensor rank.

Implements the port `dist_infer.engine.executor.Executor` (structurally: worker and engine do not import each other).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from dist_infer.messages import StepPlan, StepResult, StreamReport, TimelineReport, WorkerReport, decode, encode
from dist_infer.worker.child import STREAM_REPORTS, TIMELINES, pack_frame, unpack_frame
from dist_infer.worker.oom_watch import OomWatch
from dist_infer.worker.rank_host import RankHost
from dist_infer.worker.setup import WorkerSetup
from partition.errors import ClusterError, WorkerError

LoadProgress = Callable[[int, int], None]
_Report = TypeVar("_Report", StreamReport, TimelineReport)
_REPORT_TIMEOUT_S = 30.0


class InProcessExecutor:
    """All ranks (one per stage, tensor = 1) on one thread of this process."""

    def __init__(self, setup: WorkerSetup, *, start_timeout_s: float, progress: LoadProgress) -> None:
        self._setup, self._start_timeout_s, self._progress = setup, start_timeout_s, progress
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dist-infer-rank")
        self._host: RankHost | None = None
        self._steps: deque[tuple[int, Future[StepResult | None]]] = deque()
        self._closed = False

    def start(self) -> tuple[WorkerReport, ...]:
        def build() -> tuple[WorkerReport, ...]:
            self._host = RankHost(self._setup)
            return self._host.load(self._progress)

        try:
            return self._thread.submit(build).result(self._start_timeout_s)
        except FutureTimeout:
            raise ClusterError(
                f"loading took longer than cluster.start_timeout ({self._start_timeout_s:.0f} s)"
            ) from None
        except Exception as error:
            raise WorkerError(f"loading failed: {type(error).__name__}: {error}", rank=0) from error

    def submit(self, plan: StepPlan) -> None:
        host = self._host
        if host is None:
            raise RuntimeError("start before submit")
        self._steps.append((plan.step_id, self._thread.submit(host.step, plan)))

    def collect(self, timeout_s: float) -> StepResult:
        if not self._steps or self._closed:
            raise ClusterError("the executor was closed")
        step_id, future = self._steps[0]
        try:
            result = future.result(timeout_s)
        except FutureTimeout:
            raise ClusterError(f"step {step_id} did not finish within {timeout_s:.0f} s") from None
        except Exception as error:
            raise WorkerError(f"rank 0 failed in step {step_id}: {type(error).__name__}: {error}", rank=0) from error
        self._steps.popleft()
        if result is None:
            raise RuntimeError("the last stage returned no result")
        return result

    def stream_reports(self, timeout_s: float = _REPORT_TIMEOUT_S) -> tuple[StreamReport, ...]:
        return self._host.stream_reports() if self._host is not None else ()  # waits for nothing

    def timelines(self) -> tuple[TimelineReport, ...]:
        return self._host.timelines() if self._host is not None else ()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._host is not None:
            self._host.close()


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection  # set-up and steps: the engine's thread alone
    control: Connection  # figures: any thread, one at a time
    tp_rank: int
    owed: deque[bytes] = field(default_factory=deque)  # what it was asked on `control` and has not answered
    known: dict[bytes, bytes] = field(default_factory=dict)  # its last answer to each question


class SpawnedExecutor:
    """One child process per tensor rank, each with every stage. Steps are answered by all children."""

    def __init__(self, setups: Sequence[WorkerSetup], *, start_timeout_s: float, progress: LoadProgress) -> None:
        self._setups, self._start_timeout_s, self._progress = tuple(setups), start_timeout_s, progress
        self._children: list[_Child] = []
        self._in_flight: deque[int] = deque()
        self._asking = threading.Lock()
        self._memory = OomWatch()

    def start(self) -> tuple[WorkerReport, ...]:
        deadline = time.monotonic() + self._start_timeout_s
        for tp_rank, setup in enumerate(self._setups):
            self._children.append(_spawn(tp_rank, setup.threads))
        for child, setup in zip(self._children, self._setups, strict=True):
            self._tell(child, pack_frame("setup", encode(setup)))
        self._answers(deadline)
        if len(self._children) > 1:
            self._tell(self._children[0], pack_frame("bind"))
            port = self._answers(deadline, self._children[:1])[0][0]["port"]
            for child in self._children:
                self._tell(child, pack_frame("connect", port=port))
            self._answers(deadline)
        for child in self._children:
            self._tell(child, pack_frame("load"))
        bodies = [body for _, body in self._answers(deadline)]
        reports = [decode(WorkerReport, text.encode()) for body in bodies for text in json.loads(body)]
        return tuple(sorted(reports, key=lambda report: report.rank))

    def submit(self, plan: StepPlan) -> None:
        data = pack_frame("step", encode(plan))
        for child in self._children:
            self._tell(child, data)
        self._in_flight.append(plan.step_id)

    def collect(self, timeout_s: float) -> StepResult:
        if not self._in_flight or not self._children:
            raise ClusterError("the executor was closed")
        answers = self._answers(time.monotonic() + timeout_s)
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
        """Ends the children: a message asks, a kill after two seconds insists. A `collect` elsewhere sees them go."""
        for child in self._children:
            with contextlib.suppress(OSError):
                child.connection.send_bytes(pack_frame("close"))
        deadline = time.monotonic() + 2
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait(5)
            child.connection.close()
        with self._asking:  # who asks has seen them go
            for child in self._children:
                child.control.close()
            self._children = []

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

    def _answers(
        self, deadline: float, children: Sequence[_Child] | None = None
    ) -> list[tuple[dict[str, object], bytes]]:
        """One answer from each child, in their order. An error or a death of any ends the wait at once."""
        waiting = {child.connection: child for child in (children or self._children)}
        answers: dict[int, tuple[dict[str, object], bytes]] = {}
        while waiting:
            try:
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            except OSError:
                raise ClusterError("the executor was closed") from None
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
                    # a rank that is killed is often noticed by its peers first, as a lost connection
                    words = f"tensor rank {child.tp_rank}: {fields['message']}{self._memory.explain()}"
                    raise WorkerError(words, rank=child.tp_rank)
                if fields["kind"] == "progress":
                    if child.tp_rank == 0:
                        self._progress(int(str(fields["done"])), int(str(fields["total"])))
                    continue
                answers[child.tp_rank] = (fields, body)
                del waiting[child.connection]
        return [answers[rank] for rank in sorted(answers)]

    def _tell(self, child: _Child, frame: bytes) -> None:
        try:
            child.connection.send_bytes(frame)
        except OSError:
            raise self._death(child) from None

    def _death(self, child: _Child) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(1)
        code = child.process.poll()
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        how += self._memory.explain() if code == -signal.SIGKILL else ""
        return WorkerError(f"tensor rank {child.tp_rank} (pid {child.process.pid}) {how}", rank=child.tp_rank)


def _spawn(tp_rank: int, threads: int) -> _Child:
    """A fresh interpreter on this one's import path; no fork (threads), no re-import of the user's main module."""
    ours, theirs = socket.socketpair()
    our_control, their_control = socket.socketpair()
    fds = [theirs.fileno(), their_control.fileno()]
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
        theirs.close()
        their_control.close()
    return _Child(process, Connection(ours.detach()), Connection(our_control.detach()), tp_rank)
