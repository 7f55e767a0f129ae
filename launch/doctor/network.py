"""The network between nodes: can every node open a connection to every other, how soon, and how many bytes a second.

Each node listens on a port that the kernel chose, as ranks do. A peer has to know the run's token; one that does not,
says nothing, or sends too much is cut off.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import statistics
import struct
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import psutil

from dist_infer.interface import interface_of, own_address
from launch.doctor.finding import Finding, error, ok, warning
from partition.hardware import ASSUMED_NETWORK_BYTES_PER_S

_CHECK = "network"
TOKEN_BYTES = 16
_NUM_ECHOES = 16
_MOST_BYTES = 64 << 20
_PIECE_BYTES = 1 << 18
_SILENCE_S = 3.0
_CONNECT_S = 2.0
_COUNT = struct.Struct("!Q")
_SLOW_SHARE = 0.25
_LATE_S = 5e-3


@dataclass(frozen=True, kw_only=True)
class InterfaceFacts:
    """What carries a node's address. `speed`: Mbit/s as the driver says; 0: it does not."""

    address: str
    name: str
    mtu: int
    speed: int


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Where a node listens."""

    node: str
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class LinkFacts:
    """From one node to another. `problem`: why there is no connection; else empty, and the figures count."""

    source: str
    target: str
    host: str
    port: int
    problem: str = ""
    latency_s: float = 0.0
    bytes_per_s: float = 0.0


def read_interface(wanted: str | None, towards: str) -> InterfaceFacts:
    """What ranks of this machine will talk through. wanted: `cluster.interface`; towards: the coordinator's node.

    Raises ConfigError or ClusterError where there is none.
    """
    address = own_address(wanted, towards)
    name = interface_of(address)
    stats = psutil.net_if_stats().get(name)
    return InterfaceFacts(address=address, name=name, mtu=stats.mtu if stats else 0, speed=stats.speed if stats else 0)


class EchoServer:
    """Sends back what it gets, then counts. Owns a socket and threads until `close`; `peer.port` is free before."""

    def __init__(self, node: str, host: str, token: bytes, most_peers: int) -> None:
        """Raises OSError when the address is not this machine's."""
        self._token, self._room = token, threading.BoundedSemaphore(most_peers)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.bind((host, 0))
            self._socket.listen(most_peers)
        except OSError:
            self._socket.close()
            raise
        self.peer = Peer(node=node, host=host, port=int(self._socket.getsockname()[1]))
        threading.Thread(target=self._accept, name="dist-infer-doctor-echo", daemon=True).start()

    def close(self) -> None:
        """Listen no more; connections end within the time that silence is allowed."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="dist-infer-doctor-peer", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):  # what a peer breaks off is the peer's to say
                connection.settimeout(_SILENCE_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if not secrets.compare_digest(_read(connection, TOKEN_BYTES), self._token):
                    return
                for _ in range(_NUM_ECHOES):
                    connection.sendall(_read(connection, 1))
                connection.sendall(_COUNT.pack(_drain(connection)))
        finally:
            self._room.release()


def measure_links(source: str, peers: Iterable[Peer], token: bytes, seconds: float) -> list[LinkFacts]:
    """One peer after the other: a connection, echoes, then bytes for `seconds` or 64 MiB. Raises nothing."""
    links = []
    for peer in peers:
        try:
            latency_s, rate = _measure(peer, token, seconds)
        except OSError as caught:  # also a deadline
            problem = caught.strerror or str(caught) or type(caught).__name__
            links.append(LinkFacts(source=source, target=peer.node, host=peer.host, port=peer.port, problem=problem))
        else:
            links.append(
                LinkFacts(
                    source=source,
                    target=peer.node,
                    host=peer.host,
                    port=peer.port,
                    latency_s=latency_s,
                    bytes_per_s=rate,
                )
            )
    return links


def judge_interfaces(found: dict[str, InterfaceFacts]) -> list[Finding]:
    """found: by node."""
    findings = []
    for node, facts in found.items():
        speed = f", {facts.speed} Mbit/s" if facts.speed else ""
        findings.append(ok(_CHECK, node, f"interface {facts.name}, {facts.address}, MTU {facts.mtu}{speed}"))
    mtus = {facts.mtu for facts in found.values() if facts.mtu and facts.name != "lo"}
    if len(mtus) > 1:
        findings.append(
            warning(
                _CHECK,
                "",
                f"the interfaces of the nodes have different MTUs: {', '.join(map(str, sorted(mtus)))}",
                why="where no router says so, large packets are lost and connections hang after their first bytes",
                do="set the same MTU on all of them (`ip link set dev … mtu …`)",
            )
        )
    return findings


def slowest(links: Iterable[LinkFacts], used: Collection[str]) -> float | None:
    """Bytes per second between nodes with ranks, at the least; None: there are no two of them that meet."""
    rates = [link.bytes_per_s for link in links if not link.problem and _matters(link, used)]
    return min(rates, default=None)


def judge_links(links: Iterable[LinkFacts], used: Collection[str], *, effect: str = "") -> list[Finding]:
    """used: nodes that the plan puts ranks on; between others a broken link is no error.

    effect: in words, what the plan predicts with the slowest of them; empty where it makes no difference.
    """
    return [_judge(link, matters=_matters(link, used), effect=effect) for link in links]


def _matters(link: LinkFacts, used: Collection[str]) -> bool:
    return link.source in used and link.target in used


def _judge(link: LinkFacts, *, matters: bool, effect: str) -> Finding:
    where = f"{link.source} → {link.target}"
    if link.problem:
        what = f"no connection to {link.host}, port {link.port}: {link.problem}"
        do = (
            "let the nodes reach each other on all TCP ports (firewall, security group, NetworkPolicy): ranks bind "
            "ports that the kernel chooses"
        )
        if matters:
            return error(_CHECK, where, what, why="the ranks there could not join, and the start would time out", do=do)
        return warning(_CHECK, where, what, why="no rank is planned there now, but one may be in the next run", do=do)
    what = f"{link.latency_s * 1e3:.2f} ms, {link.bytes_per_s / 1e9:.2f} GB/s"
    is_slow = bool(effect) and link.bytes_per_s < _SLOW_SHARE * ASSUMED_NETWORK_BYTES_PER_S
    if matters and (link.latency_s > _LATE_S or is_slow):
        return warning(
            _CHECK,
            where,
            f"{what} (a plan assumes {ASSUMED_NETWORK_BYTES_PER_S / 1e9:.2f} GB/s)",
            why=f"hidden states cross it in every step, and a long prompt's are megabytes{effect if is_slow else ''}",
            do="look whether this is the interface you mean (cluster.interface), and for what else uses it; put the "
            "stages on nodes of one switch",
        )
    return ok(_CHECK, where, what)


def _measure(peer: Peer, token: bytes, seconds: float) -> tuple[float, float]:
    """(median seconds of an echo, bytes per second). Raises OSError."""
    with socket.create_connection((peer.host, peer.port), timeout=_CONNECT_S) as connection:
        connection.settimeout(_SILENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(token)
        echoes = []
        for _ in range(_NUM_ECHOES):
            started = time.perf_counter()
            connection.sendall(b"?")
            _read(connection, 1)
            echoes.append(time.perf_counter() - started)
        piece, sent = bytes(_PIECE_BYTES), 0
        started = time.perf_counter()
        while sent < _MOST_BYTES and time.perf_counter() - started < seconds:
            connection.sendall(piece)
            sent += len(piece)
        connection.shutdown(socket.SHUT_WR)
        (arrived,) = _COUNT.unpack(_read(connection, _COUNT.size))
        taken_s = time.perf_counter() - started
        if arrived != sent:
            raise OSError(f"of {sent} bytes {arrived} arrived")
        return statistics.median(echoes), sent / taken_s


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    """Exactly so many; OSError when the peer ends before, or falls silent."""
    found = bytearray()
    while len(found) < num_bytes:
        piece = connection.recv(num_bytes - len(found))
        if not piece:
            raise ConnectionResetError("the other side closed the connection")
        found += piece
    return bytes(found)


def _drain(connection: socket.socket) -> int:
    """Bytes until the peer has said all; OSError for one that sends more than it may, or falls silent."""
    buffer, total = bytearray(_PIECE_BYTES), 0
    while count := connection.recv_into(buffer):
        total += count
        if total > _MOST_BYTES:
            raise ConnectionAbortedError("more than was agreed")
    return total
