"""The executor for one tensor rank: all stages in this process.

Implements the port `dist_infer.engine.executor.Executor` (structurally: worker and engine do not import each other).
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

from dist_infer.gang_state import Loading, Step
from dist_infer.messages import StepPlan, StepResult, StreamReport, TimelineReport, WorkerReport
from dist_infer.worker.rank_host import RankHost
from dist_infer.worker.setup import WorkerSetup
from partition.errors import ClusterError, WorkerError

_CLOSED = "the executor was closed"


class InProcessExecutor:
    """All ranks (one per stage, tensor = 1) on one thread of this process."""

    def __init__(self, setup: WorkerSetup, *, start_timeout_s: float, on_step: Callable[[Step], None]) -> None:
        self._setup, self._start_timeout_s, self._on_step = setup, start_timeout_s, on_step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dist-infer-rank")
        self._host: RankHost | None = None
        self._steps: deque[tuple[int, Future[StepResult | None]]] = deque()
        self._closed = False

    def start(self) -> tuple[WorkerReport, ...]:
        def progress(done: int, total: int) -> None:
            if self._closed:
                raise ClusterError(_CLOSED)
            self._on_step(Loading(done=done, total=total))

        def build() -> tuple[WorkerReport, ...]:
            self._host = RankHost(self._setup)
            return self._host.load(progress)

        try:
            return self._thread.submit(build).result(self._start_timeout_s)
        except FutureTimeout:
            raise ClusterError(
                f"loading took longer than cluster.start_timeout ({self._start_timeout_s:.0f} s)"
            ) from None
        except Exception as error:
            _forget_frames(error)
            raise WorkerError(f"loading failed: {type(error).__name__}: {error}", rank=0) from error

    def watch(self, on_loss: Callable[[ClusterError], None]) -> None:
        """Ranks in this process are there as long as it is; what fails in a step is told by `collect`."""

    def submit(self, plan: StepPlan) -> None:
        host = self._host
        if host is None:
            raise RuntimeError("start before submit")
        self._steps.append((plan.step_id, self._thread.submit(host.step, plan)))

    def collect(self, timeout_s: float) -> StepResult:
        if not self._steps or self._closed:
            raise ClusterError(_CLOSED)
        step_id, future = self._steps[0]
        try:
            result = future.result(timeout_s)
        except FutureTimeout:
            raise ClusterError(f"step {step_id} did not finish within {timeout_s:.0f} s") from None
        except Exception as error:
            _forget_frames(error)
            raise WorkerError(f"step {step_id} failed: {_words(error)}", rank=0) from error
        self._steps.popleft()
        if result is None:
            raise RuntimeError("the last stage returned no result")
        return result

    def stream_reports(self, timeout_s: float = 0.0) -> tuple[StreamReport, ...]:
        host = self._host
        return host.stream_reports() if host is not None else ()  # waits for nothing

    def timelines(self) -> tuple[TimelineReport, ...]:
        host = self._host
        return host.timelines() if host is not None else ()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._steps.clear()
        host, self._host = self._host, None  # its memory is for whoever comes next
        if host is not None:
            host.close()


def _words(error: BaseException) -> str:
    """Errors of our own tree say where they are from."""
    return str(error) if isinstance(error, ClusterError) else f"{type(error).__name__}: {error}"


def _forget_frames(error: BaseException | None) -> None:
    """They hold the stages, whose memory is needed for those that take their place while somebody keeps the error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
