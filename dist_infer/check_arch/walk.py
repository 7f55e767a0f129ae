"""Checks of many types, each in its own process with a deadline and a memory limit, a few at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from dist_infer.check_arch.child import Task, tasks
from dist_infer.check_arch.layout import Layout
from dist_infer.check_arch.report import TypeReport, from_json

DEADLINE_S = 300.0
MEMORY_BYTES = 8 << 30
_WORDS_CHARS = 200

OnReport = Callable[[TypeReport], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkOptions:
    """`jobs`: checks at a time. `deadline_s`, `memory_bytes`: of each check."""

    jobs: int = 1
    deadline_s: float = DEADLINE_S
    memory_bytes: int = MEMORY_BYTES


def walk(
    targets: Sequence[str], layouts: Sequence[Layout], options: WalkOptions, on_report: OnReport
) -> list[TypeReport]:
    """A report for each target, in their order; `on_report` gets them as they come.

    Every process is gone when this returns or raises.
    """
    waiting = deque(dict.fromkeys(targets))
    found: dict[str, TypeReport] = {}
    running: dict[Connection, _Check] = {}
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                check = _start(waiting.popleft(), layouts, options)
                running[check.connection] = check
            nearest = min(check.deadline for check in running.values())
            ready = {id(each) for each in wait(list(running), timeout=max(0.0, nearest - time.monotonic()))}
            for connection, check in list(running.items()):
                late = time.monotonic() >= check.deadline
                if id(connection) not in ready and not late:
                    continue
                report = check.report() if id(connection) in ready else check.too_late(options.deadline_s)
                del running[connection]
                check.end()
                found[check.target] = report
                on_report(report)
    finally:
        for check in running.values():
            check.end()
    return [found[target] for target in targets]


def walk_all(
    types: Sequence[str],
    layouts: Sequence[Layout],
    options: WalkOptions,
    on_report: OnReport,
    text_type: Callable[[str], str],
) -> list[TypeReport]:
    """A report for every type; composite types with one text part (`text_type`) are checked once."""
    instead = {name: text_type(name) for name in types}
    reports = walk(sorted(set(instead.values())), layouts, options, on_report)
    by_type = {report.target: report for report in reports}
    return [replace(by_type[instead[name]], target=name) for name in types]


@dataclass(kw_only=True)
class _Check:
    target: str
    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    started: float
    directory: tempfile.TemporaryDirectory[str]
    log: Path
    ended: bool = field(default=False)

    def report(self) -> TypeReport:
        """What it answered, or how it died."""
        try:
            return from_json(self.connection.recv_bytes())
        except ValueError as error:
            return self._failure(f"the check's process answered what is no report: {error}")
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            code = self.process.poll()
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
            return self._failure(f"the check's process {how}: {self._last_words()}")

    def too_late(self, deadline_s: float) -> TypeReport:
        return self._failure(f"not done within {deadline_s:.0f} s: {self._last_words()}")

    def end(self) -> None:
        """Kill what is left of it, the tensor ranks it started too, and remove its files. Idempotent."""
        if self.ended:
            return
        self.ended = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        with contextlib.suppress(OSError):
            self.directory.cleanup()

    def _failure(self, problem: str) -> TypeReport:
        seconds = time.monotonic() - self.started
        return TypeReport(target=self.target, model_type=self.target, problem=problem, failed=True, seconds=seconds)

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines:  # of a traceback the last line is the error
                return lines[-1][-_WORDS_CHARS:]
        return "it said nothing"


def _start(target: str, layouts: Sequence[Layout], options: WalkOptions) -> _Check:
    """A fresh interpreter on this one's import path, in a session of its own so that all of it can be killed."""
    directory = tempfile.TemporaryDirectory(prefix="dist-infer-check-", ignore_cleanup_errors=True)
    work = Path(directory.name)
    task = Task(
        target=target,
        layouts=tuple(layouts),
        work=str(work),
        memory_bytes=options.memory_bytes,
        deadline_s=options.deadline_s,
    )
    theirs_in, theirs_out = os.pipe()
    log = work / "log"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "dist_infer.check_arch.child", str(theirs_out)],
                pass_fds=[theirs_out],
                env=_environment(options.jobs),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    except BaseException:
        os.close(theirs_in)
        directory.cleanup()
        raise
    finally:
        os.close(theirs_out)
    now = time.monotonic()
    check = _Check(
        target=target,
        process=process,
        connection=Connection(theirs_in, writable=False),
        deadline=now + options.deadline_s,
        started=now,
        directory=directory,
        log=log,
    )
    try:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died at once: `report` says how
                process.stdin.write(tasks.dump_json(task))
                process.stdin.close()
    except BaseException:
        check.end()
        raise
    return check


def _environment(jobs: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
    }
