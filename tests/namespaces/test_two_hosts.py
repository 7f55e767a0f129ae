"""A launch over two hosts with a stage each: the tokens of one machine; each disk holds its own part; a cut cable."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import yaml
from namespaces.asked import Asked
from namespaces.cluster import Cluster, tokens_of
from namespaces.hosts import Host, Hosts
from served_model import wait_until

from offload.format import MANIFEST_FILE, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CUT_S = 60.0


@pytest.fixture(scope="module")
def first_launch(cluster: Cluster) -> dict[str, Any]:
    """On empty disks."""
    return cluster.launch(cluster.hosts[0], cluster.run_file(cluster.hosts[0]))


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def run(cluster: Cluster, first_launch: dict[str, Any]) -> Iterator[Asked]:
    """A run over both hosts that stays, and finds everything packed."""
    file = cluster.run_file(cluster.hosts[0], cluster={"max_restarts": 10}, engine={"block_tokens": 4})
    patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "45"}  # a little less than Ray's own
    with Asked(cluster.hosts[0], file, {**cluster.environment, **patience}) as asked:
        yield asked


@pytest.fixture(scope="module")
def undisturbed(run: Asked) -> list[list[int]]:
    tokens = run.tokens()
    state = run.state()
    assert (state["packed"], state["restarts"]) == (0, 0)
    assert state["hosts"] == ["host0", "host0", "host1", "host1"]
    return tokens


def test_a_short_cut_is_a_pause(cluster: Cluster, run: Asked, undisturbed: list[list[int]]) -> None:
    """Two seconds without a cable: the same tokens, none lost, none twice."""
    run.begin_crowd()
    cluster.hosts.cut(1)
    try:
        time.sleep(2)  # the fault itself, not a wait for something
    finally:
        cluster.hosts.restore(1)
    assert run.expect("tokens") == undisturbed


def test_a_host_that_is_cut_off_is_done_without_and_comes_back_fenced(
    cluster: Cluster, run: Asked, undisturbed: list[list[int]]
) -> None:
    """FAULTS T31: the other host takes over its stage from the tokens so far; its ranks end, and change nothing."""
    hosts = cluster.hosts
    run.begin_crowd()
    assert ranks_on(hosts[1])
    hosts.cut(1)
    until = time.monotonic() + CUT_S
    try:
        assert run.expect("tokens") == undisturbed
        alone = run.state()
        assert alone["hosts"] == ["host0"] * 4
        assert re.match(r"without host1 \(10\.77\.0\.2\): .* predicted, .*; before: ", alone["note"])
        time.sleep(max(0.0, until - time.monotonic()))
    finally:
        hosts.restore(1)
    wait_until(lambda: not ranks_on(hosts[1]), 60)
    assert run.tokens() == undisturbed
    after = run.state()
    assert (after["pids"], after["restarts"]) == (alone["pids"], alone["restarts"])


def test_without_rays_head_open_requests_finish_and_later_ones_are_told(
    cluster: Cluster, run: Asked, undisturbed: list[list[int]]
) -> None:
    """FAULTS T32: ranks need no head to compute; before Ray ends everything, the run ends with its own words."""
    run.begin_crowd()
    kill_head(cluster.hosts[0])
    tokens, errors = run.end_of_crowd()
    if errors:  # where this machine is slow
        assert all("has not answered for" in error for error in errors)
    else:
        assert tokens == undisturbed
    run.wait_for_state("Failed", 60)
    assert "its head (GCS) has not answered for" in run.state()["cause"]
    assert "launch again" in run.refusal()
    assert run.end(20) == 0  # and closing it waits for nobody who is gone


def ranks_on(host: Host) -> list[int]:
    return [pid for pid in host.pids() if titled(pid, "ray::RankActor")]


def titled(pid: int, title: str) -> bool:
    try:
        return "".join(psutil.Process(pid).cmdline()).startswith(title)
    except psutil.NoSuchProcess:
        return False


def kill_head(host: Host) -> None:
    (head,) = [pid for pid in host.pids() if psutil.Process(pid).name() == "gcs_server"]
    os.kill(head, signal.SIGKILL)
