"""Nodes that meet over real sockets: closed ports, peers that say nothing, strangers on the port."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterator

import pytest

from launch.doctor import network
from launch.doctor.network import (
    EchoServer,
    InterfaceFacts,
    LinkFacts,
    Peer,
    judge_interfaces,
    judge_links,
    read_interface,
    slowest,
)
from launch.doctor.network import measure_links as measure
from partition.errors import ConfigError

TOKEN = secrets.token_bytes(16)
SECONDS = 0.05


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[EchoServer]:
    monkeypatch.setattr(network, "_SILENCE_S", 0.3)
    made = EchoServer("b", "127.0.0.1", TOKEN, most_peers=4)
    yield made
    made.close()


def test_two_nodes_that_reach_each_other(server: EchoServer) -> None:
    (link,) = measure("a", [server.peer], TOKEN, SECONDS)
    assert (link.source, link.target, link.problem) == ("a", "b", "")
    assert link.latency_s > 0
    assert link.bytes_per_s > 0
    (finding,) = judge_links([link], {"a", "b"})
    assert finding.where == "a → b"


def test_a_closed_port_is_an_error_with_its_address_and_the_next_peer_is_still_met(server: EchoServer) -> None:
    """The issue's planted fault. One broken link must not hide the others."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        port = taken.getsockname()[1]
        closed, good = measure("a", [Peer(node="c", host="127.0.0.1", port=port), server.peer], TOKEN, SECONDS)
    assert good.problem == ""
    (finding,) = judge_links([closed], {"a", "c"})
    assert (finding.severity, finding.where, finding.exit_code) == ("error", "a → c", 4)
    assert f"127.0.0.1, port {port}: Connection refused" in finding.what
    (unused,) = judge_links([closed], {"a"})
    assert unused.severity == "warning"


def test_a_peer_that_never_answers_costs_its_deadline_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_SILENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody reads
        peer = Peer(node="b", host="127.0.0.1", port=silent.getsockname()[1])
        (link,) = measure("a", [peer], TOKEN, SECONDS)
    assert "timed out" in link.problem


@pytest.mark.parametrize(
    "said",
    [b"", bytes(10_000), b"GET / HTTP/1.1\r\n\r\n", TOKEN, TOKEN + bytes(1 << 20)],
    ids=["nothing", "zeros", "HTTP", "the token", "the token and more"],
)
def test_a_stranger_on_the_port_harms_nobody(server: EchoServer, said: bytes) -> None:
    """Garbage, half of the protocol and silence; the nodes meet meanwhile and afterwards."""
    with socket.create_connection((server.peer.host, server.peer.port), timeout=2) as stranger:
        stranger.sendall(said)
        assert measure("a", [server.peer], TOKEN, SECONDS)[0].problem == ""
    assert measure("a", [server.peer], TOKEN, SECONDS)[0].problem == ""


def test_another_token_learns_nothing(server: EchoServer) -> None:
    (link,) = measure("a", [server.peer], secrets.token_bytes(16), SECONDS)
    assert link.problem


def test_more_peers_than_there_are_nodes_are_cut_off_and_make_room_again(server: EchoServer) -> None:
    """A flood of half-open connections cannot take a thread each."""
    flood = [socket.create_connection((server.peer.host, server.peer.port), timeout=2) for _ in range(8)]
    alive = [thread for thread in threading.enumerate() if thread.name == "dist-infer-doctor-peer"]
    assert len(alive) <= 4
    for each in flood:
        each.settimeout(2)
        assert each.recv(1) == b""  # at once, or once it has been silent for too long
        each.close()
    assert measure("a", [server.peer], TOKEN, SECONDS)[0].problem == ""


def test_nothing_listens_after_the_end(server: EchoServer) -> None:
    server.close()
    assert measure("a", [server.peer], TOKEN, SECONDS)[0].problem


def test_a_far_link_is_a_warning_where_ranks_use_it_and_a_slow_one_where_it_costs_tokens() -> None:
    """A gigabit is enough for most pipelines, and no reason to warn."""
    far = LinkFacts(source="a", target="b", host="h", port=1, latency_s=0.02, bytes_per_s=2e9)
    slow = LinkFacts(source="a", target="b", host="h", port=1, latency_s=1e-4, bytes_per_s=1e7)
    effect = ": predicted are 1.0 output tok/s, not 9.0"
    assert [each.severity for each in judge_links([far, slow], {"a", "b"}, effect=effect)] == ["warning", "warning"]
    assert [each.severity for each in judge_links([far, slow], {"a", "b"})] == ["warning", "ok"]
    assert [each.severity for each in judge_links([far, slow], {"a"}, effect=effect)] == ["ok", "ok"]
    assert slowest([far, slow], {"a", "b"}) == 1e7
    assert slowest([far, slow], {"a"}) is None


def test_the_interface_is_the_one_that_carries_the_address() -> None:
    assert read_interface(None, "127.0.0.1").name == "lo"
    assert read_interface("127.0.0.0/8", "127.0.0.1").name == "lo"
    with pytest.raises(ConfigError, match="nosuch0"):
        read_interface("nosuch0", "127.0.0.1")


def test_different_mtus_are_a_warning() -> None:
    """Where they differ connections hang after the first bytes, and everything else looks right."""
    jumbo = InterfaceFacts(address="10.0.0.1", name="eth0", mtu=9000, speed=10000)
    plain = InterfaceFacts(address="10.0.0.2", name="eth0", mtu=1500, speed=0)
    assert [finding.severity for finding in judge_interfaces({"a": jumbo, "b": plain})] == ["ok", "ok", "warning"]
