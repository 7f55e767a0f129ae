"""The doctor on a Ray cluster: three nodes, two of them with a fault of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_infer.config import RunConfig, load_config
from launch.doctor.cluster import ClusterProcess
from launch.doctor.examine import examine

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 20.0

# Nodes of one machine, each with a directory of its own first on its path; told to end by the end of standard input.
CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster

def add(planted, **options):
    before = os.environ["PYTHONPATH"]
    os.environ["PYTHONPATH"] = os.pathsep.join([*planted, before])
    cluster.add_node(num_cpus=2, object_store_memory=80 << 20, **options)
    os.environ["PYTHONPATH"] = before

cluster = Cluster()
add([])
add(sys.argv[1:2], resources={"other": 1})
add(sys.argv[2:3])
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Three nodes: one without faults; an older transformers and a foreign package called like ours; a broken one."""
    other, broken = tmp_path_factory.mktemp("other"), tmp_path_factory.mktemp("broken")
    info = other / "transformers-4.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    (other / "offload").mkdir()
    (other / "offload" / "__init__.py").write_text(f"__path__ = [{str(ROOT / 'offload')!r}]")  # found, and not ours
    (broken / "xxhash.py").write_text("raise ImportError('no xxhash for this Python')")
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", CLUSTER, str(other), str(broken)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith("address ")), None)
        assert line is not None, "the cluster did not start"
        yield line.split()[1]
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for member in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(member.pid) == process.pid:
                    member.kill()
        process.wait(10)
        process.stdout.close()


def config_for(content: dict[str, Any], address: str, **cluster: Any) -> RunConfig:
    sections = {"executor": "ray", "device": "cpu", "address": address, **cluster}
    return load_config({**content, "cluster": sections, "parallel": {"pipeline": 2}})


@pytest.mark.slow
def test_every_node_is_looked_at_and_every_fault_is_found_where_it_is(
    content: dict[str, Any], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The issue: `doctor` names node, reason and remedy, within 20 s."""
    monkeypatch.chdir(tmp_path)  # Ray gives workers the directory of a driver that imports from it
    report = examine(config_for(content, address))
    assert report.seconds < LIMIT_S
    errors = [finding for finding in report.findings if finding.severity == "error"]
    (silent,) = [finding for finding in errors if finding.check == "node"]
    assert silent.what == "the node could not look at itself: ImportError: no xxhash for this Python"
    foreign, older = [finding for finding in errors if finding.check == "versions"]
    assert foreign.what.startswith("the package 'offload' is found at ")
    assert older.what.startswith("transformers is 4.0.0 there and ")
    assert foreign.where == older.where != silent.where
    assert len(errors) == 3
    assert report.exit_code == 4
    clocks = [finding for finding in report.findings if finding.check == "clock"]
    links = [finding for finding in report.findings if finding.check == "network" and "→" in finding.where]
    assert "error" not in {finding.severity for finding in [*clocks, *links]}
    assert len(clocks) == len(links) == 2  # the node that cannot look takes no part


@pytest.mark.slow
def test_the_nodes_that_a_run_may_use_are_the_ones_that_count(content: dict[str, Any], address: str) -> None:
    """A fault of a node that takes no part is none of the run's; what is planned is planned on the others."""
    report = examine(config_for(content, address, node_resources={"other": 0.1}))
    assert {finding.check for finding in report.problems} == {"versions"}
    memory = [finding for finding in report.findings if finding.check == "memory"]
    assert len(memory) == 1
    assert {finding.where for finding in report.problems} == {memory[0].where}


def test_no_cluster_at_the_address_is_told_soon(content: dict[str, Any]) -> None:
    """Ray itself tries for a minute."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        report = examine(config_for(content, address))
    assert report.exit_code == 4
    error = report.first_error
    assert error is not None
    assert error.what == (
        f"the Ray cluster at {address} could not be examined: nothing answers at {address}: Connection refused"
    )


def test_a_cluster_that_never_answers_costs_the_deadline(content: dict[str, Any]) -> None:
    """Something else listens there, and says nothing: Ray has no deadline for that."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = ClusterProcess(config_for(content, f"127.0.0.1:{silent.getsockname()[1]}"))
        try:
            look = process.result(3.0)
        finally:
            process.close()
    assert look.connected is None
    assert look.problem == "connecting took too long"
