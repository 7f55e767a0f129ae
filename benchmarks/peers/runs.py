"""One run of one competitor: in the memory group, with a cold page cache, between two measurements of the disk.

A run's record says how it ended:  ok  killed (by the kernel: the group was full)  timeout  failed
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memory_group import MemoryGroup

from peers.competitors import Competitor, model_path, scratch_path
from peers.disk import device_bytes_read, drop_page_cache, read_rate, write_rate
from peers.environments import python_of, release_locks, variables_of

RUNNERS = Path(__file__).resolve().parent / "runners"
_KEPT_ERROR_CHARS = 1500
_END_TIMEOUT_S = 30.0  # for the rest of the output of what was ended


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all runs of a measurement have in common."""

    work: Path
    model_name: str
    vocab: int
    memory_bytes: int
    threads: int

    def largest_file(self) -> Path:
        files = (self.work / "models" / self.model_name).rglob("*")
        return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be generated."""

    batch: int
    prompt_tokens: int
    new_tokens: int


# the issue of one request is latency, of many the tokens of a whole answer
WORK = {1: Work(batch=1, prompt_tokens=16, new_tokens=9), 32: Work(batch=32, prompt_tokens=64, new_tokens=32)}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run. Bytes are bytes, seconds wall-clock; raw_*: O_DIRECT reads just before and after, bytes per second.

    result: the runner's own line (its marks, tokens, versions, settings), empty unless it ended well.
    """

    competitor: str
    weights: str
    batch: int
    round: int
    ended: str
    limit_bytes: int | None
    peak_bytes: int | None
    wall_s: float
    cpu_s: float
    device_bytes: int
    cold: bool
    raw_before: float
    raw_after: float
    error: str = ""
    write_rate: float | None = None
    result: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_once(shared: Shared, competitor: Competitor, work: Work, number: int, *, capped: bool) -> Record:
    """Generate. capped: within shared.memory_bytes."""
    return _run(shared, competitor, work, number, capped=capped, setting=competitor.setting, rate_of_writes=False)


def pack_once(shared: Shared, competitor: Competitor, number: int) -> Record:
    """Make dist-infer's store anew, in the group; the record has the disk's write rate as well."""
    if not competitor.packs:
        raise ValueError(f"{competitor.name} has no store")
    shutil.rmtree(scratch_path(shared.work, shared.model_name, competitor), ignore_errors=True)
    setting = f"pack:{competitor.setting}"
    return _run(shared, competitor, WORK[1], number, capped=True, setting=setting, rate_of_writes=True)


def _run(
    shared: Shared, competitor: Competitor, work: Work, number: int, *, capped: bool, setting: str, rate_of_writes: bool
) -> Record:
    scratch = scratch_path(shared.work, shared.model_name, competitor)
    scratch.mkdir(parents=True, exist_ok=True)
    job = {
        "model": str(model_path(shared.work, shared.model_name, competitor)),
        "scratch": str(scratch),
        **asdict(work),
        "vocab": shared.vocab,
        "threads": shared.threads,
        "memory_bytes": shared.memory_bytes if capped else None,
        "setting": setting,
    }
    job_file = shared.work / "job.json"
    job_file.write_text(json.dumps(job))
    if competitor.environment is None:
        python, variables = Path(sys.executable), dict(os.environ)  # finds its own number of threads
    else:
        python = python_of(shared.work, competitor.environment)
        variables = variables_of(shared.work, competitor.environment)
        variables["OMP_NUM_THREADS"] = str(shared.threads)
    release_locks(shared.work)
    measured = shared.largest_file()
    writes = write_rate(shared.work) if rate_of_writes else None
    raw_before = read_rate(measured)
    cold = drop_page_cache()
    bytes_before = device_bytes_read(shared.work)
    command = [str(python), str(RUNNERS / competitor.runner), str(job_file)]
    limit = shared.memory_bytes if capped else None
    with MemoryGroup(limit) as group:
        finished = _finish(group, command, variables, competitor.limit_s)
        kills, peak = group.num_kills, group.peak_bytes
    bytes_after = device_bytes_read(shared.work)
    if not competitor.packs:
        shutil.rmtree(scratch)
    drop_page_cache()
    result = _last_json(finished.output) if finished.code == 0 else None
    if result is not None:
        ended = "ok"
    elif finished.timed_out:
        ended = "timeout"
    else:
        ended = "killed" if kills else "failed"
    return Record(
        competitor=competitor.name,
        weights=competitor.weights,
        batch=work.batch,
        round=number,
        ended=ended,
        limit_bytes=limit,
        peak_bytes=peak,
        wall_s=finished.wall_s,
        cpu_s=finished.cpu_s,
        device_bytes=bytes_after - bytes_before,
        cold=cold,
        raw_before=raw_before,
        raw_after=read_rate(measured),
        error="" if ended == "ok" else _explained(finished),
        write_rate=writes,
        result=dict(result or {}),
    )


@dataclass(frozen=True, kw_only=True)
class _Finished:
    code: int
    output: str
    errors: str
    wall_s: float
    cpu_s: float
    timed_out: bool


def _finish(group: MemoryGroup, command: list[str], variables: Mapping[str, str], limit_s: float) -> _Finished:
    """Run to its end, or end its whole group at the limit."""
    started, before = time.perf_counter(), os.times()
    with subprocess.Popen(
        group.command(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=dict(variables),
    ) as process:
        timed_out = False
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            group.kill()
            output, errors = process.communicate(timeout=_END_TIMEOUT_S)
        except BaseException:
            group.kill()
            raise
    after = os.times()
    return _Finished(
        code=process.returncode,
        output=output,
        errors=errors,
        wall_s=time.perf_counter() - started,
        cpu_s=after.children_user + after.children_system - before.children_user - before.children_system,
        timed_out=timed_out,
    )


def _explained(finished: _Finished) -> str:
    by_signal = f"\nended by {signal.Signals(-finished.code).name}" if finished.code < 0 else ""
    return (finished.errors or finished.output)[-_KEPT_ERROR_CHARS:] + by_signal


def _last_json(output: str) -> Mapping[str, Any] | None:
    """Libraries print on stdout as well: the result is the last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else None
    return None
