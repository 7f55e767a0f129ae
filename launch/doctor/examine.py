"""From a run file to a report: every node looks at itself, nodes meet each other, and all of it is judged here."""

from __future__ import annotations

import socket
import time

from dist_infer.config import RunConfig
from dist_infer.startup import open_model
from launch.doctor.cluster import ClusterLook, ClusterProcess
from launch.doctor.judge import Judge
from launch.doctor.node import NodeLook, look_here
from launch.doctor.report import Report
from launch.doctor.running import Running

_CLUSTER_S = 15.5  # with opening the model meanwhile and planning after it, all of it ends within 20 s
_MODEL_S = 8.0


def examine(config: RunConfig) -> Report:
    """Look, judge, change nothing. Starts no Ray; of one that is there (`cluster.address`) it asks every node.

    What is wrong is a finding, whatever it is: raises nothing but our own bugs.
    """
    started_s = time.monotonic()
    process = ClusterProcess(config) if config.cluster.address is not None else None
    try:
        opening = Running(lambda: open_model(config, weights=False), limit_s=_MODEL_S, name="model")
        cluster: ClusterLook | None = None
        looks: tuple[NodeLook, ...] = ()
        if process is None:
            looks = (look_here(socket.gethostname(), config),)
        else:
            cluster = process.result(started_s + _CLUSTER_S - time.monotonic())
            looks = cluster.looks.looks if cluster.looks is not None else ()
        findings = Judge(config, looks, cluster).findings(opening)
    finally:
        if process is not None:
            process.close()
    return Report(findings=tuple(findings), seconds=time.monotonic() - started_s)
