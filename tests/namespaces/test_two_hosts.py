"""A launch over two hosts with a stage each: the tokens of one machine; each disk holds its own part; a cut cable."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml
from namespaces.cluster import Cluster, tokens_of
from namespaces.hosts import Hosts

from offload.format import MANIFEST_FILE, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
_LONG = {"max_tokens": 150}


@pytest.fixture(scope="session")
def first_launch(cluster: Cluster) -> dict[str, Any]:
    """On empty disks."""
    return cluster.launch(cluster.hosts[0], cluster.run_file(cluster.hosts[0]))


@pytest.fixture(scope="session")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one host answers without Ray, with the same ranks."""
    host = cluster.hosts[0]
    file = cluster.run_file(host)
    config = yaml.safe_load((host.own / "disk" / "run.yaml").read_text())
    config["cluster"] = {"executor": "local", "device": "cpu"}
    config["offload"]["store"] = str(tmp_path_factory.mktemp("alone"))
    (host.own / "disk" / "run.yaml").write_text(yaml.safe_dump(config))
    return tokens_of(cluster.launch(host, file))


def test_the_hosts_are_two(hosts: Hosts) -> None:
    """The script's own promise: they reach each other by their cable alone, and a cut one loses what is sent."""
    one, two = hosts[0], hosts[1]
    assert [host.run(["hostname"]).strip() for host in (one, two)] == ["host0", "host1"]
    reach = "import socket,sys; socket.create_server(('', 4711)).accept(); print('reached')"
    server = two.popen([sys.executable, "-c", reach], stdout=subprocess.PIPE)
    ask = (
        "import socket,sys,time\nuntil = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < until:\n"
        "    try:\n        socket.create_connection((sys.argv[2], 4711), 0.5).close(); print('yes'); break\n"
        "    except OSError: pass\nelse: print('no')"
    )
    hosts.cut(1)
    try:
        assert one.run([sys.executable, "-c", ask, "1", two.address]).strip() == "no"
    finally:
        hosts.restore(1)
    assert one.run([sys.executable, "-c", ask, "20", two.address]).strip() == "yes"
    assert server.communicate(timeout=10)[0].strip() == "reached"


def test_two_hosts_give_the_tokens_of_one(first_launch: dict[str, Any], alone: list[list[int]]) -> None:
    """A stage a host, hidden states by cable: float32 and greedy, so every token is the same."""
    plan = first_launch["plan"]
    assert [rank["node"] for rank in plan["ranks"]] == [0, 0, 1, 1]
    assert [budget["name"] for budget in plan["budgets"]] == ["host0", "host1"]
    assert tokens_of(first_launch) == alone
    assert all(len(tokens) == 24 for tokens in alone)


def test_each_host_packed_what_its_ranks_own(cluster: Cluster, first_launch: dict[str, Any]) -> None:
    """From its own copy of the checkpoint, on its own disk; the manifest of each names what is there, and all of it."""
    own = []
    for index in range(2):
        (manifest,) = (cluster.hosts[index].own / "disk" / "stores").glob(f"*/{MANIFEST_FILE}")
        blobs = read_manifest(manifest.parent).blobs
        assert {blob.file for blob in blobs} == {path.name for path in manifest.parent.glob("*.bin")}
        assert not list(manifest.parent.glob("*.tmp"))
        own.append({(blob.unit, blob.tp_rank) for blob in blobs})
    assert own == [
        {
            (unit["name"], rank["tp_rank"])
            for rank in first_launch["plan"]["ranks"]
            if rank["node"] == node
            for unit in rank["units"]
        }
        for node in range(2)
    ]
    assert not own[0] & own[1]
    assert first_launch["pack"]["num_written"] == len(own[0] | own[1])


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, first_launch: dict[str, Any]) -> list[list[int]]:
    """Long answers, by a launch that finds everything packed."""
    document = cluster.launch(cluster.hosts[0], cluster.run_file(cluster.hosts[0], run=_LONG))
    assert document["pack"]["num_written"] == 0
    return tokens_of(document)


def test_a_short_cut_is_a_pause(cluster: Cluster, undisturbed: list[list[int]]) -> None:
    """Two seconds without a cable: the same tokens, none lost, none twice."""
    process = _launched(cluster)
    cluster.hosts.cut(1)
    try:
        time.sleep(2)  # the fault itself, not a wait for something
    finally:
        cluster.hosts.restore(1)
    assert _tokens_at_the_end(process) == undisturbed


def test_a_host_that_stays_cut_off_is_done_without(cluster: Cluster, undisturbed: list[list[int]]) -> None:
    """FAULTS T31: the other host takes over its stage and goes on from the tokens so far; later both are used again."""
    process = _launched(cluster)
    cluster.hosts.cut(1)
    try:
        assert _tokens_at_the_end(process) == undisturbed
    finally:
        cluster.hosts.restore(1)


def _launched(cluster: Cluster) -> subprocess.Popen[str]:
    """A launch with long answers, of which the first tokens are out."""
    host = cluster.hosts[0]
    command = [sys.executable, "-m", "launch.cli", "launch", cluster.run_file(host, run=_LONG), "--json"]
    process = host.popen(command, cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("[1] ") and not line.startswith("[1] >"):  # that is the prompt
            return process
    raise AssertionError(f"it ended before there was an answer:\n{''.join(lines)}")


def _tokens_at_the_end(process: subprocess.Popen[str]) -> list[list[int]]:
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    return tokens_of(json.loads(output))
