"""`launch --detach`: the same command in a session of its own, writing to a log; this one stays until it is ready."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from dist_infer.messages import decode
from launch.interrupt import GRACE_S
from launch.runs.announce import ENVIRONMENT, Notice
from launch.runs.place import private_directory, run_directory, writing_down
from launch.runs.record import RunRecord, read_record
from launch.runs.stop import down
from partition.errors import ClusterError, DistInferError

_TAIL_LINES = 20
_END_S = 20.0


class DetachedError(DistInferError):
    """The detached run's own error, with its own exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch_detached(name: str, arguments: list[str], show: Callable[[Notice], None]) -> RunRecord:
    """Start `dist-infer` with these arguments as the run of that name; returns its record when it is ready.

    show: told how far it is. Raises DetachedError with what the run said, and nothing is left of it then; so is nothing
    when this is interrupted.
    """
    directory = run_directory(name)
    log = directory / f"launch-{secrets.token_hex(4)}.log"
    with writing_down():
        output = os.fdopen(_open_log(log), "wb")
    read, write = os.pipe()
    try:
        with output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.entry", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(write,),
                env={
                    **os.environ,
                    ENVIRONMENT: f"{write}:{log}",
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                },
            )
    finally:
        os.close(write)
    try:
        with os.fdopen(read, encoding="utf-8") as notices:
            failed = _follow(notices, show)
        if failed is not None:
            message = failed.error or f"{name} was ended before it was ready"
            raise DetachedError(message, _code_of(process) or failed.exit_code or 1)
        record = read_record(directory)
        if record is None or record.process.pid != process.pid:
            raise ClusterError(f"{name} was ready and is gone already: see {log}")
        return record
    except _Silent:
        code, tail = _code_of(process), _tail(log)
        _forget(log, directory)
        _clear(process, name, directory)
        if code < 0:
            how, code = f"was ended by signal {-code} ({signal.strsignal(-code)})", ClusterError.exit_code
        else:
            how = f"ended with code {code}"
        raise DetachedError(f"{name} {how} before it was ready\n{tail}".rstrip(), code or 1) from None
    except DetachedError:
        _forget(log, directory)
        raise
    except BaseException:
        _end(process)
        _clear(process, name, directory)
        raise


class _Silent(Exception):
    """The run has ended without a word."""


def _follow(notices: Iterable[str], show: Callable[[Notice], None]) -> Notice | None:
    """None once it is ready; the notice with which it has failed or was ended. The pipe ends when the run does."""
    for line in notices:
        notice = decode(Notice, line.encode())
        if notice.phase == "failed" or notice.exit_code:
            return notice
        if notice.phase in ("ready", "ended"):
            return None
        show(notice)
    raise _Silent


def _open_log(log: Path) -> int:
    """A descriptor. Until this run has the name, the one before may remove the directory with all that is in it."""
    while True:
        private_directory(log.parent)
        with contextlib.suppress(FileNotFoundError):
            return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _code_of(process: subprocess.Popen[bytes]) -> int:
    """Its exit code, negative for a signal's number. It has said its last word and is about to end, or is ended."""
    try:
        return process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _clear(process: subprocess.Popen[bytes], name: str, directory: Path) -> None:
    """What a run has left that is written down and could not end in order."""
    record = read_record(directory)
    if record is not None and record.process.pid == process.pid:
        down(name, now=True)


def _forget(log: Path, directory: Path) -> None:
    """The log of a run that never had the name, or that is written down nowhere."""
    record = read_record(directory)
    if record is None or record.log != str(log):
        log.unlink(missing_ok=True)


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C in its own terminal would."""
    with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
        process.send_signal(signal.SIGINT)
        process.wait(GRACE_S - 2)
    if process.poll() is None:
        process.kill()
