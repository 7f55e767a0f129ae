"""Ways to hurt a process of a run, or a file that it reads."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from faults.conftest import READS, Strace
from named_runs import until
from reliability.clients import Clients, shape_fault
from reliability.suffering import Hurt
from reliability.system import System

_STOPPED_S = 30.0
_FAILING_S = 5.0


@dataclass(frozen=True)
class Clock:
    """To be preloaded by a whole system: `ahead` then chooses the one process whose clock is 20 s ahead."""

    library: Path
    file: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "CLOCK_SKEW": str(self.file)}

    def ahead(self, pid: int) -> None:
        with self.file.open("r+b") as file:
            file.write(struct.pack("i", pid))

    def num_told(self) -> int:
        """How often it was told the other time."""
        return int(struct.unpack("iI", self.file.read_bytes())[1])


def kill_rank(number: int) -> Callable[[System, Clients], Hurt]:
    def inject(system: System, clients: Clients) -> Hurt:
        system.rank(number).kill()
        return Hurt()

    return inject


def stop_rank(number: int) -> Callable[[System, Clients], Hurt]:
    def inject(system: System, clients: Clients) -> Hurt:
        rank = system.rank(number)
        rank.suspend()
        waking = threading.Timer(_STOPPED_S, _wake, [rank])
        waking.daemon = True
        waking.start()

        def mend() -> None:
            """It was killed for its silence: nobody is left to be woken."""
            psutil.wait_procs([rank], timeout=_STOPPED_S)
            waking.cancel()

        return Hurt(mend=mend)

    return inject


def _wake(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.resume()


def skew_clock(clock: Clock, number: int) -> Callable[[System, Clients], Hurt]:
    def inject(system: System, clients: Clients) -> Hurt:
        before, before_answered = clock.num_told(), sum(asked.end == "answered" for asked in clients.asked)
        clock.ahead(system.rank(number).pid)
        until(lambda: clock.num_told() > before, 20)
        until(lambda: sum(asked.end == "answered" for asked in clients.asked) > before_answered + 20, 60)
        return Hurt(mend=lambda: clock.ahead(0))

    return inject


def damage_blobs(directory: Path, units: Sequence[str], tp_rank: int) -> Callable[[System, Clients], Hurt]:
    """One rank cannot use the units that it reads in this pass: it raises in the middle of a forward."""

    def inject(system: System, clients: Clients) -> Hurt:
        blobs = [path for unit in units for path in directory.glob(f"*/{unit}.tp{tp_rank}.bin")]
        assert blobs
        for blob in blobs:
            _flip(blob)

        def mend() -> None:
            for blob in blobs:
                _flip(blob)

        return Hurt(mend=mend)

    return inject


def _flip(blob: Path) -> None:
    """A bit in each page: what stays in memory of a unit is not read again."""
    with blob.open("r+b") as file:
        for at in range(100, blob.stat().st_size, 4096):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 4]))


@contextlib.contextmanager
def failing_reads(rank: psutil.Process, directory: Path) -> Iterator[Strace]:
    """Every fifth read of that rank ends with EIO."""
    strace = Strace(rank.pid, directory / "strace.log", READS, "error=EIO:when=5+5")
    try:
        strace.wait_attached()
        yield strace
    finally:
        strace.detach()


def fail_reads(number: int, directory: Path) -> Callable[[System, Clients], Hurt]:
    def inject(system: System, clients: Clients) -> Hurt:
        before = system.scrape().sum("dist_infer_read_retries_total")
        with failing_reads(system.rank(number), directory):
            until(lambda: system.scrape().sum("dist_infer_read_retries_total") > before + 5, 60)
        return Hurt()

    return inject


def kill_role(role: str, *, is_back: Callable[[System, int], bool] | None = None) -> Callable[[System, Clients], Hurt]:
    """The one process of that role. is_back: with the pid that was killed, where readiness does not say it."""

    def inject(system: System, clients: Clients) -> Hurt:
        (victim,) = system.of_role(role)
        victim.kill()
        return Hurt(is_back=None if is_back is None else lambda: is_back(system, victim.pid))

    return inject


def another_of(role: str) -> Callable[[System, int], bool]:
    """Whether another process has taken that role."""

    def is_back(system: System, pid: int) -> bool:
        found = [process.pid for process in system.of_role(role)]
        return len(found) == 1 and found != [pid]

    return is_back


def crowd_of_long_ones(num_requests: int, prompt: str, max_tokens: int) -> Callable[[System, Clients], Hurt]:
    """More at once than the KV cache has room for: all are answered, some had to begin again."""

    def inject(system: System, clients: Clients) -> Hurt:
        bodies = [
            {"prompt": f"{number}{prompt}", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
            for number in range(num_requests)
        ]
        before = system.scrape().sum("dist_infer_preemptions_total")
        together = [""] * num_requests

        def ask(number: int) -> None:
            together[number] = system.ask(bodies[number], timeout_s=180)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(num_requests)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert system.scrape().sum("dist_infer_preemptions_total") > before
        assert together[:2] == [system.ask(body) for body in bodies[:2]]  # alone, as far as the load lets it be
        assert all(together)
        return Hurt()

    return inject


def ask_too_much(prompt_tokens: int) -> Callable[[System, Clients], Hurt]:
    """Beyond what the KV cache holds altogether."""

    def inject(system: System, clients: Clients) -> Hurt:
        for body in ({"prompt": [5] * prompt_tokens, "max_tokens": 1}, {"prompt": "x", "max_tokens": prompt_tokens}):
            answer = httpx.post(f"{system.url}/v1/completions", json=body, timeout=30)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert shape_fault(answer.text) == ""
        return Hurt()

    return inject


def launch_again(*overrides: str, words: str) -> Callable[[System, Clients], Hurt]:
    """A second launch, which must be refused with these words ({port}, {url} and {pid} are the first one's)."""

    def inject(system: System, clients: Clients) -> Hurt:
        pid = system.shell.record("tiny").process.pid
        settings = [part for override in overrides for part in ("--set", override)]
        done = system.shell.run("launch", system.file, *settings)
        assert done.code in (2, 4), done.err
        assert words.format(port=system.port, url=system.url, pid=pid) in done.err, done.err
        assert "Traceback" not in done.err
        for override in overrides:  # a failed run is kept until somebody has seen it
            system.shell.run("down", override.removeprefix("name="))
        return Hurt()

    return inject


def end_driver(system: System, number: signal.Signals) -> psutil.Process:
    """The process of the launch, which was sent that signal."""
    driver = psutil.Process(system.shell.record("tiny").process.pid)
    os.kill(driver.pid, number)
    return driver
