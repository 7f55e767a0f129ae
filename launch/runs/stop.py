"""Drains and ends runs by their names. What is signalled is the process that wrote the record, and no other."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

from launch.interrupt import GRACE_S
from launch.runs.clear import clear_here, clear_in_cluster
from launch.runs.logs import require_record
from launch.runs.place import run_directory
from launch.runs.record import RunRecord, read_record
from launch.runs.run import take_name
from launch.runs.watch import Watch
from partition.errors import ClusterError, ConfigError

_AFTER_DRAIN_S = 70.0  # the replica's answers and the end of the ranks
_KILLED_S = 10.0
_NAME_S = 3.0
_DRAINABLE = ("ready", "degraded")


def drain(name: str) -> None:
    """Refuse new requests and let those that run finish; returns when they have. The run stays until `down`.

    Raises ConfigError for a run that serves nothing, ClusterError when it does not come to an end in its time.
    """
    directory, record = run_directory(name), require_record(name)
    if record.kind != "serve":
        raise ConfigError(f"{name} answers the prompts of its file and then ends: there is nothing to drain")
    if record.state == "drained":
        return
    if record.state not in (*_DRAINABLE, "draining"):
        raise ConfigError(f"{name} is {record.state}, so there is nothing to drain")
    deadline = time.monotonic() + record.drain_s + _AFTER_DRAIN_S
    with Watch(directory) as watch:
        if record.state != "draining":
            _signal(record, signal.SIGUSR1)
        while time.monotonic() < deadline:
            found = read_record(directory)
            if found is None or found.run_id != record.run_id or found.phase == "drained" or not found.is_alive:
                return
            watch.wait(deadline - time.monotonic())
    raise ClusterError(f"{name} (pid {record.process.pid}) has not drained in time: `dist-infer down --now {name}`")


def down(name: str, *, now: bool) -> str:
    """End the run of that name and all that it started, in words what was done. Idempotent.

    A run that serves is drained first, unless `now`. Raises ClusterError when something is left that cannot be ended;
    the name stays known then. With `now` a cluster that does not answer is taken for gone.
    """
    directory = run_directory(name)
    if not directory.is_dir():
        return f"{name}: nothing is there"
    record = read_record(directory)
    was_alive = record is not None and record.is_alive
    if record is not None and was_alive:
        _end(record, now=now)
    descriptor = _take_name(directory)
    if descriptor is None:
        raise ClusterError(f"another run named {name} is being started: `dist-infer status {name}`")
    try:
        found = read_record(directory)
        if found is not None:
            if found.is_alive:
                raise ClusterError(f"another run named {name} has been started: `dist-infer status {name}`")
            clear_here(found)
            if found.phase != "ended":  # in that order it has cleared up itself
                _clear_in_cluster(found, now=now)
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)
    if was_alive:
        return f"{name}: ended"
    return f"{name}: was {record.state} already; what it left is gone" if record is not None else f"{name}: cleared"


def _clear_in_cluster(record: RunRecord, *, now: bool) -> None:
    try:
        clear_in_cluster(record)
    except ClusterError as error:
        if not now:
            raise ClusterError(
                f"{record.name} is ended here; what it had in its cluster may be there still: {error}. Call "
                f"`dist-infer down {record.name}` again when that answers, or with --now if it is gone for good"
            ) from error


def _end(record: RunRecord, *, now: bool) -> None:
    """Ask, wait, insist."""
    drains = record.kind == "serve" and record.phase in (*_DRAINABLE, "draining", "drained") and not now
    if drains:
        _signal(record, signal.SIGTERM)
        if record.process.wait(record.drain_s + _AFTER_DRAIN_S):
            return
    _signal(record, signal.SIGINT)
    if record.process.wait(GRACE_S + 2):
        return
    _signal(record, signal.SIGKILL)
    if not record.process.wait(_KILLED_S):
        raise ClusterError(f"{record.name}: process {record.process.pid} cannot be ended: it is stuck in the kernel")


def _signal(record: RunRecord, number: signal.Signals) -> None:
    try:
        record.process.send(number)
    except PermissionError as error:
        raise ConfigError(f"{record.name} (pid {record.process.pid}) is another user's: {error}") from error


def _take_name(directory: Path) -> int | None:
    """As take_name; a run that has said how it ended has its name for a moment longer."""
    deadline = time.monotonic() + _NAME_S
    while (descriptor := take_name(directory)) is None and time.monotonic() < deadline:
        with Watch(directory) as watch:
            watch.wait(deadline - time.monotonic())
    return descriptor


def all_records(directory: Path) -> list[RunRecord]:
    """Of this machine, by name."""
    found = [read_record(entry) for entry in sorted(directory.iterdir())]
    return [record for record in found if record is not None]
