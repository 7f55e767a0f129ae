"""The port the endpoint will listen on: free now, or taken, and by whom."""

from __future__ import annotations

import contextlib
import socket

import psutil

from dist_infer.serve_config import ServeConfig
from launch.doctor.finding import Finding, error, ok

_CHECK = "ports"


def check_port(node: str, run: ServeConfig) -> Finding:
    """Binds it for a moment, as the endpoint will."""
    place = f"[{run.host}]:{run.port}" if ":" in run.host else f"{run.host}:{run.port}"
    if run.port == 0:
        return ok(_CHECK, node, f"run.port: 0, the endpoint takes one on {run.host} that is free")
    family = socket.AF_INET6 if ":" in run.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((run.host, run.port))
            probe.listen(1)
        except OSError as caught:
            return error(
                _CHECK,
                node,
                f"cannot listen on {place}: {caught.strerror or caught}{_holder(run.port)}",
                why="the model would be loaded for an endpoint that nobody can reach",
                do="choose another run.port (0 takes any that is free) or run.host, or end what listens there",
                kind="config",
            )
    return ok(_CHECK, node, f"{place} is free")


def _holder(port: int) -> str:
    """Who listens there, where this user may know it."""
    with contextlib.suppress(psutil.Error, OSError):
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port and found.pid:
                with contextlib.suppress(psutil.Error):
                    return f", process {found.pid} ({psutil.Process(found.pid).name()}) listens there"
    return ""
