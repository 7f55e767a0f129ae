"""What a run and its ranks wrote, and how it is read on while they write.

A rank's own output is in a file of Ray's that begins with its label, on its node. With the local executor ranks write
to where the process that started them writes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch.runs.mark import REPLICA, first_line, run_label
from launch.runs.place import run_directory
from launch.runs.record import RunRecord, read_record
from launch.runs.run import KEPT_LOGS
from launch.runs.watch import Watch
from partition.errors import ConfigError

_HEAD_BYTES = 4096  # of a worker's output: its first lines, in which it says who it is
_PIECE_BYTES = 1 << 20
_LOOK_S = 1.0


def newest_worker_log(directory: Path, line: str, *, error: bool) -> Path | None:
    """Of the workers whose output begins with this line, the one that began last; error: what it wrote to stderr."""
    found = [file for file in directory.glob("worker-*.out") if _begins_with(file, line)]
    with contextlib.suppress(OSError):
        newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
        if newest is not None:
            return newest.with_suffix(".err") if error else newest
    return None


def _begins_with(file: Path, line: str) -> bool:
    """Ray writes a line or two of its own first."""
    with contextlib.suppress(OSError), file.open("rb") as handle:
        return line.encode() in handle.read(_HEAD_BYTES).splitlines()
    return False


def print_log(record: RunRecord, which: str | None, *, follow: bool) -> None:
    """Print what is there to stdout; with `follow` also what comes, until the run has ended.

    which: None for the run's own output, a rank's number, or `replica`. ConfigError where there is no such log.
    """
    if which is None:
        files = [_own_log(record)]
    else:
        who = REPLICA if which == REPLICA else f"rank {_rank(which)}"
        line = first_line(run_label(record.name, record.run_id), who)
        files = _worker_logs(record, line)
        if not files and record.address is not None and record.is_alive:
            _print_remote(record, line, follow=follow)
            return
        if not files:
            raise ConfigError(f"{record.name} has no log of {who}: {_where_instead(record)}")
    for text in _texts(record, files, follow=follow):
        sys.stdout.write(text)
        sys.stdout.flush()


def _own_log(record: RunRecord) -> Path:
    if record.log is None:
        raise ConfigError(
            f"{record.name} writes to the terminal it was started in; with `launch --detach` there is a log. "
            "`logs NAME RANK` and `logs NAME replica` show what its processes wrote"
        )
    return Path(record.log)


def _rank(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{text!r} is neither a rank's number nor `{REPLICA}`")
    return int(text)


def _where_instead(record: RunRecord) -> str:
    if record.state == "starting":
        return "it is still starting"
    return (
        "no such rank has started on this machine. With cluster.executor: local ranks write to the log of the process "
        f"they live in: `dist-infer logs {record.name}{' replica' if record.kind == 'serve' else ''}`"
    )


def _worker_logs(record: RunRecord, line: str) -> list[Path]:
    """stdout and stderr of the newest such worker on this machine; of a failed run what was kept."""
    kept = run_directory(record.name) / KEPT_LOGS
    for directory in (Path(record.logs) if record.logs is not None else kept, kept):
        found = [newest_worker_log(directory, line, error=error) for error in (False, True)]
        if files := [file for file in found if file is not None and file.exists()]:
            return files
    return []


def _texts(record: RunRecord, files: list[Path], *, follow: bool) -> Iterator[str]:
    """What is in the files, one after the other; then what is added to either, until the run is no more."""
    with contextlib.ExitStack() as stack:
        handles = []
        for file in files:
            try:
                handles.append(stack.enter_context(file.open(encoding="utf-8", errors="replace")))
            except OSError as error:
                raise ConfigError(f"cannot read {file}: {error}") from error
        watch = stack.enter_context(Watch(files[0].parent)) if follow else None
        while True:
            is_last = not follow or not record.is_alive  # asked before reading: what was written until then is read
            for handle in handles:
                while text := handle.read(_PIECE_BYTES):
                    yield text
            if watch is None or is_last:
                return
            watch.wait(_LOOK_S)


def _print_remote(record: RunRecord, line: str, *, follow: bool) -> None:
    """From the nodes of a cluster. New text is asked for once a second."""
    from launch.runs.cluster import connected, read_worker_log

    offsets: tuple[dict[str, int], dict[str, int]] = ({}, {})
    directory = run_directory(record.name)
    anything = False
    with Watch(directory) as watch, connected(str(record.address)):
        while True:
            is_last = not follow or not record.is_alive
            for error in (False, True):
                for _, text in read_worker_log(str(record.address), line, error, offsets[error]):
                    anything = True
                    sys.stdout.write(text)
            sys.stdout.flush()
            if not anything:
                raise ConfigError(f"no node of {record.address} has a log that begins with {line!r}")
            if is_last:
                return
            started = time.monotonic()
            while (left := started + _LOOK_S - time.monotonic()) > 0:
                watch.wait(left)


def require_record(name: str) -> RunRecord:
    """What is known of the run of that name. ConfigError when nothing is."""
    record = read_record(run_directory(name))
    if record is None:
        raise ConfigError(f"no run is named {name} on this machine: `dist-infer status` shows those that there are")
    return record
