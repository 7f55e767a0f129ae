"""The Ray actor of one rank: a thin shell around `RankHost`. JSON goes in and comes out, never an object of ours."""

from __future__ import annotations

import os
import socket
import traceback
from typing import TYPE_CHECKING

import ray

from dist_infer.interface import own_address
from dist_infer.messages import StepPlan, decode, encode
from dist_infer.worker.setup import WorkerSetup
from launch.root_guard import check_one_root

if TYPE_CHECKING:  # it imports torch and transformers, which the driver need not wait for
    from dist_infer.worker.rank_host import RankHost


@ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=1, concurrency_groups={"control": 1, "heart": 1})
class RankActor:
    """One rank. Methods of the default group run one at a time, in the order of their calls."""

    def __init__(self, setup: bytes, interface: str | None, first_line: str) -> None:
        check_one_root()
        print(first_line, flush=True)  # by it `dist-infer logs` finds this rank's file
        from dist_infer.worker.rank_host import RankHost

        self._host: RankHost = RankHost(decode(WorkerSetup, setup))
        self._interface = interface  # cluster.interface
        self._progress = (0, 0)

    def whoami(self) -> tuple[str, int, str]:
        """(host name, pid, node address): also the sign that the process is up."""
        return socket.gethostname(), os.getpid(), ray.util.get_node_ip_address()

    def bind(self) -> tuple[str, int]:
        host = own_address(self._interface, towards=ray.util.get_node_ip_address())
        return host, self._host.bind(host)

    def connect(self, host: str, port: int) -> None:
        self._host.connect(host, port, own_address(self._interface, towards=host))

    def load(self) -> bytes:
        def note(done: int, total: int) -> None:
            self._progress = (done, total)

        return encode(self._host.load(note)[0])

    def step(self, plan: bytes) -> bytes:
        try:
            result = self._host.step(decode(StepPlan, plan))
        except Exception:
            traceback.print_exc()  # the rank's own log keeps the whole trace
            raise
        return b"" if result is None else encode(result)

    @ray.method(concurrency_group="heart")  # type: ignore[untyped-decorator]
    def beat(self) -> None:
        """That the process is there; also while a pass is under way."""

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def progress(self) -> tuple[int, int]:
        """(units read, units to read) of `load`."""
        return self._progress

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def stream_report(self) -> bytes:
        return encode(self._host.stream_reports()[0])

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def timeline(self) -> bytes:
        """Empty where nothing is recorded."""
        return b"".join(encode(report) for report in self._host.timelines())
