"""The memory group of the benchmarks: a ceiling that holds for a whole process tree, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory_group import MemoryGroup, controller_root
from partition.errors import ConfigError

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "memory_group.py"
MIB = 1 << 20
TAKE = "held = bytearray({} << 20); held[::4096] = b'x' * len(held[::4096]); print('took')"


def run(group: MemoryGroup, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(group.command(command), capture_output=True, text=True, timeout=60, check=False)


def test_peak_is_of_what_ran_in_it() -> None:
    """Guards against a limit that is not applied to children, and against a peak of another group."""
    with MemoryGroup(200 * MIB) as group:
        done = run(group, "sh", "-c", f'{sys.executable} -c "{TAKE.format(64)}"')
        assert (done.returncode, done.stdout) == (0, "took\n")
        assert group.peak_bytes is not None
        assert 64 * MIB <= group.peak_bytes <= 200 * MIB
        assert group.num_kills == 0


def test_more_than_the_limit_is_killed_and_counted() -> None:
    """Guards against a limit of 0 or none (two writes instead of one), and against a kill read as a plain failure."""
    with MemoryGroup(64 * MIB) as group:
        done = run(group, sys.executable, "-c", TAKE.format(128))
        assert done.returncode == -9
        assert "took" not in done.stdout
        assert group.num_kills >= 1


def test_end_takes_everything_with_it() -> None:
    """Guards against processes that outlive a measurement, and against groups that pile up."""
    with MemoryGroup(None) as group:
        inside = ["sh", "-c", "sleep 600 & echo inside; exec sleep 600"]
        child = subprocess.Popen(group.command(inside), stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "inside\n"
        assert len(group.pids()) == 2
    assert child.wait(timeout=10) == -9
    child.stdout.close()
    assert not group.folder.exists()


def test_no_group_is_left_when_the_limit_is_refused(tmp_path: Path) -> None:
    """Guards against a start that fails half-way: what it says, and what it leaves."""
    with pytest.raises(ConfigError, match="at least 1 MiB"):
        MemoryGroup(1000)
    nowhere = tmp_path / "no" / "such" / "group"
    with pytest.raises(ConfigError, match="no memory cgroup can be made"), MemoryGroup(MIB * 16, nowhere):
        pass


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        (
            "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "31 25 0:27 / {v2} rw - cgroup2 cgroup2 rw\n",
            "/sys/fs/cgroup/memory",
        ),
        ("31 25 0:27 / {v2} rw - cgroup2 cgroup2 rw\n", "{v2}"),
    ],
    ids=["v1 beside v2", "v2 alone"],
)
def test_the_tree_with_the_memory_controller_is_found(tmp_path: Path, mounts: str, expected: str) -> None:
    """Guards against making the group in the v2 tree of a machine whose memory controller is in v1."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    file = tmp_path / "mountinfo"
    file.write_text(mounts.format(v2=tmp_path))
    assert str(controller_root(file)) == expected.format(v2=tmp_path)


def test_a_machine_without_the_controller_is_told_so(tmp_path: Path) -> None:
    """Guards against a v2 tree that does not have the memory controller."""
    (tmp_path / "cgroup.controllers").write_text("cpu pids\n")
    file = tmp_path / "mountinfo"
    file.write_text(f"31 25 0:27 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    with pytest.raises(ConfigError, match="no memory cgroup controller"):
        controller_root(file)


def test_command_line_says_the_peak_and_keeps_the_exit_code() -> None:
    """Guards the script: a command's own failure is not swallowed, and its peak is printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "64MiB", "sh", "-c", "echo out; exit 7"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "out\n")
    assert "of 64.00 MiB used at most" in done.stderr
