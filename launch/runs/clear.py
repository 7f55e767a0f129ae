"""Clears up behind a run that is there no more: its processes and its Ray, or its parts in a cluster that was there."""

from __future__ import annotations

from launch.runs.mark import MARK, run_label
from launch.runs.reap import reap
from launch.runs.record import RunRecord
from partition.errors import ClusterError


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
    """In the Ray cluster that it used, if it did not start one. Raises ClusterError when that does not answer."""
    if record.address is not None:
        from launch.runs.cluster import clear_cluster

        clear_cluster(record.address, run_label(record.name, record.run_id))
