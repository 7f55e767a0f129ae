"""Whether Ray itself is there: its head (GCS), which knows all nodes and actors, and this node's own part (raylet).

Ranks compute without a head, so nothing else notices that it is gone, until Ray ends every process that has missed it
for a minute, this one too, without our last words. Calls that need it wait meanwhile. A head that comes back in time
was never lost. That of a Ray that was started for one run never does.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from partition.errors import ClusterError, ClusterGoneError

_INTERVAL_S = 1.0
_ANSWER_S = 2.0
_SILENT_S = 5.0
_GRACE_S = 8.0  # without a raylet Ray ends its processes after some 14 s
_RAYS_SETTING, _RAYS_PATIENCE_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
_OURS = 0.7  # of that: what is left is for requests to end with an error, and for this process to end by itself
_TO_FINISH = 0.5  # of that, where Ray is to be ended and started again within it


@dataclass(frozen=True)
class Gone:
    """What is gone for good, and how long Ray lets this process go on after that, less a margin."""

    what: str
    grace_s: float


Ask = Callable[[float], Gone | None]
"""None where all is well. Waits so many seconds at most; raises where nobody answers, LookupError where somebody does
who does not know this node (yet, if it has just been started again)."""


class HeadWatch:
    """Owns a thread from `start` until `stop`; any thread may call the others.

    is_ours: it is a Ray that was started for this run, so that another one can take its place; then its loss is a
    ClusterError, else a ClusterGoneError.
    """

    def __init__(self, ask: Ask, *, is_ours: bool, patience_s: float | None = None) -> None:
        self._ask, self._is_ours = ask, is_ours
        self._patience_s = _OURS * _rays_patience() if patience_s is None else patience_s
        self._changed = threading.Condition()  # guards the two below
        self._answered_s = time.monotonic()
        self._error: ClusterError | None = None
        self.grace_s = 0.0  # once it is lost: for what can be finished without it
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
        except Exception as error:  # Ray's own are many, and each means the same
            silent_s = time.monotonic() - self._answered_s
            what = "known this node" if isinstance(error, LookupError) else "answered"
            gone = None
            if silent_s > self._patience_s:
                gone = Gone(f"its head (GCS) has not {what} for {silent_s:.0f} s", _GRACE_S)
        else:
            if gone is None:
                with self._changed:
                    self._answered_s = time.monotonic()
                    self._changed.notify_all()
        if gone is not None and not self._stopped.is_set():
            with self._changed:
                self._error, self.grace_s = self._loss(gone.what), gone.grace_s
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
    from ray._private import worker

    client = worker.global_worker.gcs_client
    own = ray.NodeID.from_hex(ray.get_runtime_context().get_node_id())
    raylet, ended_s = _find_raylet(worker._global_node.raylet_socket_name), 0.0

    def ask(timeout_s: float) -> Gone | None:
        nonlocal ended_s
        if raylet is not None and _has_ended(raylet):
            ended_s = ended_s or time.monotonic()
            if time.monotonic() < ended_s + _GRACE_S:
                return None  # what can be finished now is
            return Gone(f"its raylet here (pid {raylet.pid}) has ended", 0.0)
        if client.check_alive([own], timeout=timeout_s) != [True]:
            raise LookupError
        return None

    return ask


def ask_own() -> Ask:
    """Of the Ray that this process has started."""
    from ray._private import worker

    node, cluster = worker._global_node, ask_cluster()

    def ask(timeout_s: float) -> Gone | None:
        # a raylet takes the processes that it has started with it, the replica and the ranks
        for name, grace_s in (("gcs_server", _TO_FINISH * _rays_patience()), ("raylet", 0.0)):
            for info in node.all_processes.get(name, ()):
                code = info.process.poll()
                if code is not None:
                    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                    return Gone(f"its {name} (pid {info.process.pid}) {how}", grace_s)
        return cluster(timeout_s)

    return ask


def _find_raylet(socket: str) -> psutil.Process | None:
    """Of this node, if this process may see it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and f"--raylet_socket_name={socket}" in process.cmdline():
                return process
    return None


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _rays_patience() -> float:
    return float(os.environ.get(_RAYS_SETTING, _RAYS_PATIENCE_S))
