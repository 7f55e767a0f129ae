"""Clears up behind a run that is there no more: its processes and its Ray, or its parts in a cluster that was there."""

from __future__ import annotations

import os
import subprocess
import sys

from launch.runs.mark import MARK, run_label
from launch.runs.reap import reap
from launch.runs.record import RunRecord
from partition.errors import ClusterError

_CLUSTER_S = 90.0  # connecting takes seconds, and a replica has 20 to end


def clear_here(record: RunRecord) -> None:
    """On this machine. Nothing to do for a run that has ended by itself. The caller holds the name's lock.

    Raises ClusterError when something is still there afterwards.
    """
    left = reap(f"{MARK}={record.run_id}", record.home)
    if left:
        raise ClusterError(
            f"of the run {record.name} that was killed, processes {', '.join(map(str, left))} cannot be ended: they "
            "are stuck in the kernel, as on a disk or GPU that does not answer"
        )


def clear_in_cluster(record: RunRecord) -> None:
    """In the Ray cluster that it used, if it did not start one. Raises ClusterError when that does not answer.

    By a process of its own: Ray gives no deadline for connecting, and leaves traces in whoever has connected.
    """
    if record.address is None:
        return
    told = [record.address, run_label(record.name, record.run_id)]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch.runs.cluster", *told],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CLUSTER_S,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"the Ray cluster at {record.address} did not answer within {_CLUSTER_S:g} s") from error
    if done.returncode != 0:
        raise ClusterError(done.stderr.strip().rpartition("\n")[2] or f"it ended with code {done.returncode}")
