"""Whether Ray itself is there: its head (GCS), which knows all nodes and actors, and this node's own part (raylet).

Ranks compute without a head, so nothing else notices that it is gone, until Ray ends every process that has missed it
for a minute, this one too, without our last words. Calls that need it wait meanwhile. A head that comes back in time
was never lost. That of a Ray that was started for one run never does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from partition.errors import ClusterError, ClusterGoneError

_INTERVAL_S = 1.0
_ANSWER_S = 2.0
_SILENT_S = 5.0
_RAYS_SETTING, _RAYS_PATIENCE_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
_OURS = 0.7  # of that: what is left is for requests to end with an error, and for this process to end by itself

Ask = Callable[[float], str]
"""Empty where all is well, else what is gone for good. Waits so many seconds at most; raises when nobody answers."""


class HeadWatch:
    """Owns a thread from `start` until `stop`; any thread may call the others.

    is_ours: it is a Ray that was started for this run, so that another one can take its place; then its loss is a
    ClusterError, else a ClusterGoneError.
    """

    def __init__(self, ask: Ask, *, is_ours: bool, patience_s: float | None = None) -> None:
        self._ask, self._is_ours = ask, is_ours
        self._patience_s = _patience() if patience_s is None else patience_s
        self._changed = threading.Condition()  # guards the two below
        self._answered_s = time.monotonic()
        self._error: ClusterError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dist-infer-head-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for a question that is under way. Idempotent."""
        self._stopped.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * _ANSWER_S)

    @property
    def is_silent(self) -> bool:
        """Whether a call that needs the head would have to wait for it."""
        return time.monotonic() - self._answered_s > _SILENT_S

    @property
    def is_lost(self) -> bool:
        """By what is known now, asked again if it is ours: its processes need not be waited for."""
        if self._is_ours and self._error is None:
            self._look()
        return self._error is not None

    def raise_if_lost(self) -> None:
        if self._error is not None:
            raise self._error

    def wait_for_answer(self) -> None:
        """If the head is silent, until it answers. Raises what its loss is."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or not self.is_silent, timeout=self._patience_s + 2 * _ANSWER_S
            )
        self.raise_if_lost()

    def _run(self) -> None:
        while not self._stopped.is_set() and self._error is None:
            asked_s = time.monotonic()
            self._look()
            self._stopped.wait(max(0.0, asked_s + _INTERVAL_S - time.monotonic()))

    def _look(self) -> None:
        try:
            gone = self._ask(_ANSWER_S)
        except Exception:  # Ray's own are many, and each means the same
            silent_s = time.monotonic() - self._answered_s
            gone = f"its head (GCS) has not answered for {silent_s:.0f} s" if silent_s > self._patience_s else ""
        else:
            if not gone:
                with self._changed:
                    self._answered_s = time.monotonic()
                    self._changed.notify_all()
        if gone and not self._stopped.is_set():
            with self._changed:
                self._error = self._loss(gone)
                self._changed.notify_all()

    def _loss(self, gone: str) -> ClusterError:
        if self._is_ours:
            return ClusterError(f"Ray is lost: {gone}")
        return ClusterGoneError(
            f"the Ray cluster is lost: {gone}. Without it no rank can be started in place of another: see its "
            "gcs_server.out, start Ray again, then launch again"
        )


def ask_cluster() -> Ask:
    """Of the cluster that this process is connected to."""
    import ray
    from ray._private.worker import global_worker

    client = global_worker.gcs_client
    own = ray.NodeID.from_hex(ray.get_runtime_context().get_node_id())

    def ask(timeout_s: float) -> str:
        known: list[bool] = client.check_alive([own], timeout=timeout_s)
        return "" if known == [True] else "its head (GCS) does not know this node: it was started anew, or gave us up"

    return ask


def ask_own() -> Ask:
    """Of the Ray that this process has started."""
    from ray._private import worker

    node, cluster = worker._global_node, ask_cluster()

    def ask(timeout_s: float) -> str:
        for name in ("gcs_server", "raylet"):
            for info in node.all_processes.get(name, ()):
                code = info.process.poll()
                if code is not None:
                    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                    return f"its {name} (pid {info.process.pid}) {how}"
        return cluster(timeout_s)

    return ask


def _patience() -> float:
    return _OURS * float(os.environ.get(_RAYS_SETTING, _RAYS_PATIENCE_S))
