"""The doctor on three hosts with a Ray cluster across them: another version, a full disk, an unreachable port."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces.cluster import Cluster
from namespaces.hosts import Hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LIMIT_S = 20.0
DISK_BYTES = 32 << 20


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, timeout=30)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Iterator[Cluster]:
    """host1 has an older transformers; host2 a full disk of its own, and no way to host1."""
    with Hosts(tmp_path_factory.mktemp("faulty"), 3) as hosts:
        full = hosts[2].own / "disk"
        run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", full)
        try:
            for index in range(3):
                shutil.copytree(tiny_checkpoint("llama"), hosts[index].own / "disk" / "model")
            older = hosts[1].own / "disk" / "site" / "transformers-4.0.0.dist-info"
            older.mkdir(parents=True)
            (older / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
            run("ip", "-n", hosts[2].namespace, "route", "add", "unreachable", f"{hosts[1].address}/32")
            cluster = Cluster(hosts)
            cluster.environment["PYTHONPATH"] += f":{hosts.disk / 'site'}"
            cluster.start()
            (full / "other").write_bytes(bytes(shutil.disk_usage(full).free - (64 << 10)))
            yield cluster
            hosts.close()
        finally:
            run("umount", "--lazy", full)


def test_three_planted_faults_are_found_where_they_are(faulty: Cluster) -> None:
    """The issue's acceptance: each with its node, its reason and what to do; within 20 s; exit code 4."""
    file = faulty.run_file(faulty.hosts[0], parallel={"tensor": 1, "pipeline": 3})
    process = faulty.hosts[0].popen(
        [sys.executable, "-P", "-m", "launch.cli", "doctor", file, "--json"],
        faulty.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    report = json.loads(out)
    assert report["seconds"] < LIMIT_S
    errors: list[dict[str, Any]] = [each for each in report["findings"] if each["severity"] == "error"]
    assert all(each["why"] and each["do"] for each in errors)
    found = {(each["check"], each["where"]) for each in errors}
    one, two = "host1 (10.77.0.2)", "host2 (10.77.0.3)"
    assert found == {("versions", one), ("disk", two), ("network", f"{two} → {one}"), ("network", f"{one} → {two}")}
    assert next(each for each in errors if each["check"] == "versions")["what"].startswith("transformers is 4.0.0")
    assert "offload.store" in next(each for each in errors if each["check"] == "disk")["do"]
    links = [each for each in report["findings"] if each["check"] == "network" and "→" in each["where"]]
    assert len(links) == 6
    interfaces = [each for each in report["findings"] if each["what"].startswith("interface eth0, 10.77.0.")]
    assert len(interfaces) == 3
    assert not [each for each in report["findings"] if "did not run" in each["what"]]
