"""Hidden states from a stage to the next one, between ranks of the same tp_rank. Sending does not hold up computing."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist

from partition.errors import ClusterError

_Failure = (RuntimeError, dist.DistError)


class StageLink:
    """One rank's links. Sends go out in order, each as soon as the next stage wants it; receives wait.

    previous, following: ranks of the world, if there are. A thread waits for what is being sent, at most
    `most_waiting` (the steps in flight) hidden states, which live until then. Each wait ends at the group's timeout,
    `timeout_s`. All errors are ClusterErrors that name the peer; that of a send comes with the next call.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        previous: int | None,
        following: int | None,
        *,
        timeout_s: float,
        most_waiting: int,
    ) -> None:
        self._group, self._previous, self._following = group, previous, following
        self._timeout_s = timeout_s
        self._error: Exception | None = None
        self._sending: queue.Queue[tuple[dist.Work, torch.Tensor] | None] = queue.Queue(max(1, most_waiting))
        self._thread: threading.Thread | None = None

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self._previous is None:
            raise RuntimeError("the first stage receives nothing")
        hidden = torch.empty(tuple(shape), dtype=dtype, device=device)
        try:
            dist.recv(hidden, src=self._previous, group=self._group)
        except _Failure as error:
            late = f"within {self._timeout_s:g} s (engine.step_timeout)"
            raise ClusterError(f"no hidden states from rank {self._previous} {late}: {error}") from error
        return hidden

    def send(self, hidden: torch.Tensor) -> None:
        """Waits only where `most_waiting` are on their way already."""
        if self._following is None:
            raise RuntimeError("the last stage sends nothing")
        self.check()
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait_for_sends, name="dist-infer-send", daemon=True)
            self._thread.start()
        hidden = hidden.contiguous()
        try:
            work = dist.isend(hidden, dst=self._following, group=self._group)
        except _Failure as error:
            raise self._failed(error) from error
        if work is None:
            return
        try:
            self._sending.put((work, hidden), timeout=self._timeout_s)
        except queue.Full:
            raise ClusterError(
                f"rank {self._following} has taken no hidden states for {self._timeout_s:g} s (engine.step_timeout)"
            ) from None

    def check(self) -> None:
        """Raises what a send met since it was called."""
        if self._error is not None:
            raise self._failed(self._error) from self._error

    def close(self) -> None:
        """Waits until what was sent has arrived, or failed. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(queue.Full):
                self._sending.put(None, timeout=self._timeout_s)
                thread.join(self._timeout_s)

    def _failed(self, error: Exception) -> ClusterError:
        return ClusterError(f"hidden states did not get to rank {self._following}: {error}")

    def _wait_for_sends(self) -> None:
        while (item := self._sending.get()) is not None:
            work, hidden = item
            try:
                work.wait()
            except Exception as error:
                self._error = self._error or error  # whoever sends next hears of it; nobody may be blocked by it
            del item, work, hidden  # not kept until the next one
