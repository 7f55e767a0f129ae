"""What the machine allows, from real and from made-up /proc and cgroup trees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from offload.machine import cores, measure_read, memory_limit
from partition.errors import StoreError

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712


class FakeMachine:
    """A /proc with mountinfo pointing at cgroup trees under `root`."""

    def __init__(self, root):
        self.root = root
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.write("proc/meminfo", f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable:   {48 * GIB // 1024} kB\n")
        self.write("proc/self/cgroup", "")
        self.write("proc/self/mountinfo", "22 1 0:20 / /sys rw - sysfs sysfs rw\n")

    def write(self, path, text):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a" if path.endswith(("self/cgroup", "mountinfo")) else "w") as file:
            file.write(text)

    def mount(self, folder, options, kind="cgroup", root="/"):
        where = str(self.root / folder).replace(" ", "\\040")
        self.write("proc/self/mountinfo", f"30 22 0:30 {root} {where} rw,nosuid shared:9 - {kind} {kind} {options}\n")

    def v1(self, group, limit, usage, active=0, inactive=0):
        self.write(f"{group}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{group}/memory.usage_in_bytes", f"{usage}\n")
        stat = f"active_file 1\ninactive_file 1\ntotal_active_file {active}\ntotal_inactive_file {inactive}\n"
        self.write(f"{group}/memory.stat", stat)

    def v2(self, group, limit, usage, active=0, inactive=0):
        self.write(f"{group}/memory.max", f"{limit}\n")
        self.write(f"{group}/memory.current", f"{usage}\n")
        self.write(f"{group}/memory.stat", f"anon 5\nactive_file {active}\ninactive_file {inactive}\n")


@pytest.fixture
def machine(tmp_path):
    return FakeMachine(tmp_path)


def facts(machine):
    found = memory_limit(machine.proc)
    return found.bytes_available, found.source


def test_without_groups_the_machine_is_the_limit(machine):
    assert facts(machine) == (48 * GIB, "MemAvailable")


def test_v1_own_group_with_its_page_cache_given_back(machine):
    machine.mount("cg memory", "rw,memory")
    machine.write("proc/self/cgroup", "9:name=systemd:/\n4:memory:/lab12\n0::/\n")
    machine.v1("cg memory", NO_LIMIT_V1, 20 * GIB)
    machine.v1("cg memory/lab12", 3 * GIB, 2 * GIB, active=GIB // 2, inactive=GIB // 4)
    assert facts(machine) == (3 * GIB - 2 * GIB + GIB * 3 // 4, "cgroup v1 /lab12")


def test_v1_a_parent_may_be_tighter(machine):
    machine.mount("mem", "rw,memory")
    machine.write("proc/self/cgroup", "4:cpu,memory:/a/b\n")
    machine.v1("mem/a/b", 8 * GIB, GIB)
    machine.v1("mem/a", 4 * GIB, 3 * GIB)
    assert facts(machine) == (GIB, "cgroup v1 /a")


def test_v1_in_a_container_that_sees_its_part_of_the_tree(machine):
    machine.mount("mem", "rw,memory", root="/docker/abc")
    machine.write("proc/self/cgroup", "4:memory:/docker/abc/inner\n")
    machine.v1("mem", 2 * GIB, GIB)
    machine.v1("mem/inner", 4 * GIB, GIB)
    assert facts(machine) == (GIB, "cgroup v1 /docker/abc")


def test_v2_walks_to_the_root(machine):
    machine.mount("cg", "rw,nsdelegate", kind="cgroup2")
    machine.write("proc/self/cgroup", "0::/user.slice/job\n")
    machine.v2("cg/user.slice/job", "max", GIB)
    machine.v2("cg/user.slice", 10 * GIB, 6 * GIB, inactive=GIB)
    assert facts(machine) == (5 * GIB, "cgroup v2 /user.slice")


def test_v2_outside_of_the_namespace_cannot_lead_out_of_the_mount(machine):
    machine.mount("deep/cg", "rw", kind="cgroup2")
    machine.write("proc/self/cgroup", "0::/../..\n")
    machine.v2("deep/cg", 10 * GIB, 4 * GIB)
    assert facts(machine) == (6 * GIB, "cgroup v2 /")


def test_both_versions_at_once_and_an_overdrawn_group_has_nothing_left(machine):
    machine.mount("mem", "rw,memory")
    machine.mount("unified", "rw", kind="cgroup2")
    machine.write("proc/self/cgroup", "4:memory:/a\n0::/a\n")
    machine.v1("mem/a", GIB, 2 * GIB)
    machine.v2("unified/a", 8 * GIB, 0)
    assert facts(machine) == (0, "cgroup v1 /a")


def test_no_meminfo_is_a_typed_error(tmp_path):
    with pytest.raises(StoreError, match="meminfo"):
        memory_limit(tmp_path)


def test_the_real_machine_has_memory_and_cores():
    assert memory_limit().bytes_available > 0
    assert 1 <= cores() <= len(os.sched_getaffinity(0))


@pytest.fixture
def sixteen(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.mark.usefixtures("sixteen")
@pytest.mark.parametrize(("quota", "expected"), [("-1", 16), ("250000", 2), ("50000", 1), ("6400000", 16)])
def test_cores_of_a_v1_quota(machine, quota, expected):
    machine.mount("cpu", "rw,cpu,cpuacct")
    machine.write("proc/self/cgroup", "1:cpu,cpuacct:/a/b\n")
    machine.write("cpu/a/cpu.cfs_quota_us", quota)
    machine.write("cpu/a/cpu.cfs_period_us", "100000")
    assert cores(machine.proc) == expected


@pytest.mark.usefixtures("sixteen")
@pytest.mark.parametrize(("maximum", "expected"), [("max 100000", 16), ("300000 100000", 3), ("", 16)])
def test_cores_of_a_v2_quota(machine, maximum, expected):
    machine.mount("cg", "rw", kind="cgroup2")
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.write("cg/a/cpu.max", maximum)
    assert cores(machine.proc) == expected


def test_reading_speed_of_a_file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(os.urandom(300_000))
    assert measure_read(path, seconds=0.01) > 0
    path.write_bytes(b"short")
    with pytest.raises(StoreError, match="less than 4096 bytes"):
        measure_read(path)
    with pytest.raises(StoreError, match="cannot be measured"):
        measure_read(tmp_path / "gone")


def test_planning_can_ask_the_machine_without_torch():
    code = "import sys, offload.machine, offload.format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
