"""Processes by more than their pid; what a killed run leaves is ended, and nothing else is."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.runs import reap
from launch.runs.process import ProcessId

SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; print(flush=True); time.sleep(60)"]
# a child of a child whose parent is gone, in a session of its own, with a mapped file in shared memory
ORPHAN = """
import os, sys, mmap
if os.fork(): os._exit(0)
os.setsid()
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    mapped = mmap.mmap(file.fileno(), 4096)
print(os.getpid(), flush=True)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
import time; time.sleep(60)
"""


def process_id(pid: int) -> ProcessId:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return replace(ProcessId.here(), pid=pid, start_ticks=int(fields[19]))


def test_a_pid_that_is_another_process_by_now_is_not_signalled() -> None:
    """Guards against ending somebody else's process after the pid was given out again, or after a reboot."""
    with subprocess.Popen(SLEEPER, stdout=subprocess.PIPE) as process:
        found = process_id(process.pid)
        for other in (replace(found, start_ticks=found.start_ticks - 1), replace(found, boot_id="another")):
            assert not other.is_alive
            assert not other.send(signal.SIGKILL)
            assert other.wait(0)
        assert found.is_alive
        assert not found.wait(0)
        assert found.send(signal.SIGKILL)
        assert found.wait(10)
        assert not found.is_alive, "a zombie is no process that runs"
        process.wait()
    assert not found.send(signal.SIGKILL)


def test_all_that_carries_the_mark_is_ended(tmp_path: Path) -> None:
    """T27: also what was started by what is gone, in another session; its shared memory and its directory go too."""
    mark = f"DIST_INFER_RUN={tmp_path.name}-{os.getpid()}"
    variable, value = mark.split("=")
    shared = Path(f"/dev/shm/dist-infer-test-{os.getpid()}")
    home = tmp_path / "home"
    (home / "ray").mkdir(parents=True)
    orphan = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(shared)], env={**os.environ, variable: value}, stdout=subprocess.PIPE
    )
    with (
        subprocess.Popen(SLEEPER, env={**os.environ, variable: value}, stdout=subprocess.PIPE) as child,
        subprocess.Popen(SLEEPER, env={**os.environ, variable: value + "0"}, stdout=subprocess.PIPE) as other,
    ):
        assert child.stdout is not None
        child.stdout.readline()
        assert sorted(reap.marked(mark)) == sorted([int(orphan.stdout), child.pid])
        assert shared.exists()
        assert reap.reap(mark, str(home)) == []
        assert child.wait(10) == -signal.SIGKILL
        assert not shared.exists()
        assert not home.exists()
        assert other.poll() is None
        other.kill()


def test_shared_memory_that_others_have_mapped_stays(tmp_path: Path) -> None:
    """Guards other programs: CUDA, for one, has files that all processes of a user share."""
    mark = f"DIST_INFER_RUN={tmp_path.name}-{os.getpid()}"
    variable, value = mark.split("=")
    shared = Path(f"/dev/shm/dist-infer-test-{os.getpid()}")
    try:
        with shared.open("w+b") as file:
            file.truncate(4096)
            with mmap.mmap(file.fileno(), 4096):
                command = [sys.executable, "-c", ORPHAN, str(shared)]
                subprocess.run(command, env={**os.environ, variable: value}, stdout=subprocess.PIPE, check=True)
                assert reap.reap(mark, None) == []
                assert reap.marked(mark) == []
                assert shared.exists()
    finally:
        shared.unlink()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_guardian_clears_up_behind_a_process_however_it_ends(number: signal.Signals, tmp_path: Path) -> None:
    """T07: a killed driver can clear up nothing itself."""
    mark = f"DIST_INFER_RUN={tmp_path.name}-{os.getpid()}"
    variable, value = mark.split("=")
    home = tmp_path / "home"
    home.mkdir()
    with (
        subprocess.Popen(SLEEPER, stdout=subprocess.PIPE) as driver,
        subprocess.Popen(SLEEPER, env={**os.environ, variable: value}, stdout=subprocess.PIPE) as child,
    ):
        assert driver.stdout is not None
        driver.stdout.readline()
        found = process_id(driver.pid)
        guard = [sys.executable, "-I", "-S", reap.__file__, str(driver.pid), str(found.start_ticks), mark, str(home)]
        subprocess.run(guard, check=True, start_new_session=True, env={}, timeout=20)  # returns: it is nobody's child
        assert child.poll() is None
        driver.send_signal(number)
        driver.wait()
        assert child.wait(10) == -signal.SIGKILL
