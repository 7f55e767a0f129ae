"""What Ray does to the process that starts it, and what it listens on: kept to what a run needs."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

_log = logging.getLogger(__name__)

# Read by Ray on every system, for all its name says: 0 makes the node's address 127.0.0.1, and what Ray then starts
# listens there alone. An address given to ray.init does not: a loopback one is replaced.
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextlib.contextmanager
def own_machine(*, only: bool) -> Iterator[None]:
    """Around `ray.init`. only: nothing that Ray starts is to be reached from another machine.

    Ray's handler of SIGTERM would end this process without its finally clauses: ours stays.
    """
    from ray._private import ray_constants

    had, was_enabled = os.environ.get(_CLUSTERS), ray_constants.ENABLE_RAY_CLUSTER
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    if only:
        os.environ[_CLUSTERS] = "0"  # for what is started
        ray_constants.ENABLE_RAY_CLUSTER = False  # here it was read when Ray was imported
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_enabled
        os.environ.pop(_CLUSTERS, None)
        if had is not None:
            os.environ[_CLUSTERS] = had
        if in_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def keep_standard_output() -> None:
    """Before `ray.init`: what Ray has to tell of lost nodes is logged. It would print it where answers are printed."""
    from ray._private import worker

    show = worker.print_to_stdstream
    if show.__module__ == __name__:
        return

    def log_or_show(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        if data["pid"] != "raylet":
            show(data, ignore_prefix)
            return
        for message in data["lines"]:  # one sentence of each: then come guesses and the end of somebody's log
            _log.warning("Ray: %s", str(message).partition("\n")[0].partition(". ")[0])

    worker.print_to_stdstream = log_or_show


def listen_on_own_address() -> None:
    """In a replica, before Serve has finished making it: its port for other deployments is on the node's address.

    Serve would listen on every interface. What calls it comes with the token, and by the node's address.
    """
    import ray
    from ray.serve._private import replica

    listen = getattr(replica, "add_port_to_grpc_server", None)
    if listen is None:  # older versions have no such port
        return

    @functools.wraps(listen)
    def on_own_address(server: Any, address: str) -> int:
        host = ray.util.get_node_ip_address()
        port = address.rpartition(":")[2]
        found: int = listen(server, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        return found

    replica.add_port_to_grpc_server = on_own_address
