"""This process as the run of a name: the lock, the record, the secrets, and the guardian that clears up behind it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from dist_infer import __version__
from dist_infer.config import RunConfig
from dist_infer.serve_config import ServeConfig
from dist_infer.startup import Progress
from launch.interrupt import EXIT_CODE, before_force
from launch.raylet import RAYLET
from launch.runs import reap
from launch.runs.announce import Announcer, Notice
from launch.runs.clear import clear_here, clear_in_cluster
from launch.runs.mark import MARK, new_run_id
from launch.runs.place import private_directory, run_directory, writing_down
from launch.runs.process import ProcessId
from launch.runs.ray_home import VARIABLES, RayHome
from launch.runs.record import RunRecord, read_record, write_record
from launch.runs.watch import Watch
from partition.errors import ClusterError, ConfigError, DistInferError

KEPT_LOGS = "ranks"  # what the ranks of a failed run wrote
_NOTE_EVERY_S = 0.5
_FIRST_RECORD_S = 2.0  # from taking the name to being written down
_GUARD_START_S = 20.0


class Run:
    """A context: inside it this process holds the name. Leaving it says how the run ended, and gives the name back.

    So it does with the environment, which has the run's mark and its Ray's token and directory meanwhile. Raises
    ConfigError when the name is taken, saying by whom.
    """

    def __init__(self, config: RunConfig, file: Path, announcer: Announcer) -> None:
        self._config, self._file, self._announcer = config, file, announcer
        self._lock: int | None = None
        self._home: RayHome | None = None
        self._environment: dict[str, str | None] = {}  # as it was before, of what is set here
        self._noting = threading.Lock()  # guards the two below
        self._record: RunRecord | None = None
        self._noted_s = 0.0

    @property
    def record(self) -> RunRecord:
        if self._record is None:
            raise RuntimeError("the run has not been entered")
        return self._record

    def __enter__(self) -> Run:
        self._directory = run_directory(self._config.name)
        with writing_down():
            self._lock = take_name(self._directory)
        if self._lock is None:
            raise ConfigError(_taken(self._config.name, self._directory))
        try:
            self._enter()
        except BaseException:
            if self._home is not None:
                self._home.remove()
            self._restore_environment()
            os.close(self._lock)
            raise
        return self

    def _enter(self) -> None:
        old = read_record(self._directory)
        if old is not None:
            if old.is_alive:  # where locks are not kept between machines or mounts
                raise ConfigError(_taken(self._config.name, self._directory))
            clear_here(old)
            if old.phase != "ended":
                with contextlib.suppress(ClusterError):  # of a cluster that is gone nothing is left
                    clear_in_cluster(old)
        with writing_down():
            _forget_files(self._directory, self._announcer.log)
        run_id, cluster = new_run_id(), self._config.cluster
        serves = self._config.run if isinstance(self._config.run, ServeConfig) else None
        self._environment = {variable: os.environ.get(variable) for variable in (MARK, RAYLET, *VARIABLES)}
        os.environ |= {MARK: run_id, RAYLET: str(os.getpid())}
        process = ProcessId.here()
        if cluster.address is None and (serves is not None or cluster.executor == "ray"):
            self._home = RayHome.make()
            self._home.enter()
            _start_guardian(process, run_id, self._home)
        record = RunRecord(
            name=self._config.name,
            run_id=run_id,
            kind="generate" if serves is None else "serve",
            file=str(self._file.absolute()),
            version=__version__,
            process=process,
            started_s=time.time(),
            drain_s=0.0 if serves is None else serves.limits.drain_time,
            address=cluster.address,
            home=None if self._home is None else str(self._home.path),
            logs=None if self._home is None else str(self._home.logs),
            log=self._announcer.log,
        )
        with writing_down():
            self._write(record)
        if cluster.address is not None:
            before_force.append(self._say_what_may_be_left)
        elif not self._announcer.is_detached:
            before_force.append(self._forget)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        phase, code = _ending(error)
        if self._home is not None:
            if phase == "failed":
                self._home.keep_logs(self._directory / KEPT_LOGS)
            self._home.remove()
        self._restore_environment()
        text = "" if error is None or code == EXIT_CODE else str(error) or type(error).__name__
        self._change(lambda old: replace(old, phase=phase, detail="", error=text, exit_code=code, home=None, logs=None))
        if phase == "ended" and not self._announcer.is_detached:
            self._forget()
        before_force[:] = [call for call in before_force if call not in (self._forget, self._say_what_may_be_left)]
        if self._lock is not None:
            os.close(self._lock)

    def _restore_environment(self) -> None:
        for variable, value in self._environment.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value

    def progress(self, progress: Progress) -> None:
        """What is under way; written down now and then. Any thread."""
        with self._noting:
            is_new = progress.phase != self.record.detail
            if not is_new and time.monotonic() - self._noted_s < _NOTE_EVERY_S:
                return
        self.note("starting", detail=progress.phase, done=progress.done, total=progress.total)

    def note(self, phase: str, *, detail: str = "", done: int = 0, total: int = 0, url: str | None = None) -> bool:
        """Where the run stands. False when that was known. Any thread. url: None for the one that is known."""
        return self._change(
            lambda old: replace(old, phase=phase, detail=detail, done=done, total=total, url=url or old.url)
        )

    def note_logs(self, directory: str) -> None:
        """Where Ray writes on this machine, in a cluster that was there."""
        self._change(lambda old: replace(old, logs=directory))

    def _change(self, change: Callable[[RunRecord], RunRecord]) -> bool:
        with self._noting:
            found = change(self.record)
            if found == self.record:
                return False
            with contextlib.suppress(OSError):  # a full disk is no reason to end a run that is under way
                self._write(found)
            return True

    def _write(self, record: RunRecord) -> None:
        self._record, self._noted_s = record, time.monotonic()
        notice = Notice(
            phase=record.phase,
            detail=record.detail,
            done=record.done,
            total=record.total,
            url=record.url,
            error=record.error,
            exit_code=record.exit_code,
        )
        try:
            write_record(self._directory, record)
        finally:
            self._announcer.say(notice)  # who hears it may look at the record

    def _forget(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _say_what_may_be_left(self) -> None:
        text = f"ended by force: `dist-infer down {self._config.name}` removes what is left in the Ray cluster\n"
        os.write(sys.stderr.fileno(), text.encode())  # a stream's own lock may be held by whom the signal interrupted


def take_name(directory: Path) -> int | None:
    """The descriptor of the name's lock, held until it is closed or this process ends; None when another holds it."""
    while True:
        private_directory(directory)
        try:
            descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # who held it has just removed the directory
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == (directory / "lock").stat().st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # it was removed by the one before, and holds nothing


def _taken(name: str, directory: Path) -> str:
    deadline = time.monotonic() + _FIRST_RECORD_S
    found = read_record(directory)
    with contextlib.suppress(OSError), Watch(directory) as watch:
        while (found is None or not found.is_alive) and time.monotonic() < deadline:
            watch.wait(deadline - time.monotonic())
            found = read_record(directory)
    who = "it is being started"
    if found is not None and found.is_alive:
        who = f"pid {found.process.pid}, {found.url or found.phase}"
    return (
        f"a run named {name} is there already: {who}. End it with `dist-infer down {name}`, or give this one another "
        f"name with --set name=NAME"
    )


def _forget_files(directory: Path, own_log: str | None) -> None:
    """What an earlier run of this name left to be read. If it took this one's log with it, there is another."""
    if own_log is not None and not Path(own_log).exists():
        descriptor = os.open(own_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.close(descriptor)
    shutil.rmtree(directory / KEPT_LOGS, ignore_errors=True)
    for file in directory.glob("*.log"):
        if str(file) != own_log:
            file.unlink(missing_ok=True)


def _start_guardian(process: ProcessId, run_id: str, home: RayHome) -> None:
    """Not a child, not of this session, without the mark: it outlives all that it clears up."""
    told = [str(process.pid), str(process.start_ticks), f"{MARK}={run_id}", str(home.path)]
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", reap.__file__, *told],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={},
            timeout=_GUARD_START_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(f"could not start the process that clears up behind this one: {error}") from error


def _ending(error: BaseException | None) -> tuple[str, int]:
    """(phase, exit code)"""
    if error is None:
        return "ended", 0
    if isinstance(error, KeyboardInterrupt):
        return "ended", EXIT_CODE
    return "failed", error.exit_code if isinstance(error, DistInferError) else 1
