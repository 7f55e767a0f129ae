"""In a process of its own: connects to a Ray cluster, lets every node look at itself, and lets them meet each other.

main   RunConfig as JSON on standard input -> Connected, Looks, Met, a line each, on standard output
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_infer.config import RunConfig, load_config
from dist_infer.messages import decode, encode
from launch.doctor.clock import ClockSample
from launch.doctor.network import TOKEN_BYTES, LinkFacts
from launch.doctor.node import LOOK_S, FailedCheck, NodeLook
from launch.nodes import ClusterNode, cluster_nodes
from partition.errors import ClusterError

_PROCESS_S = 4.0  # a worker process comes up, with our imports
_NETWORK_S = 3.0  # of sending, all peers of a node together
_MOST_EACH_S = 1.0
_CLOCK_S = 1.0
_REACH_S = 3.0
_NUM_CLOCK_SAMPLES = 3
_NEAR_S = 5.0  # what else the network part may take: connecting, echoes, silence


@dataclass(frozen=True, kw_only=True)
class Connected:
    """The nodes that the run may use, the coordinator's first. `labels[i]` names nodes[i] and is unique."""

    nodes: tuple[ClusterNode, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Looks:
    """One of each node, in their order."""

    looks: tuple[NodeLook, ...]


@dataclass(frozen=True, kw_only=True)
class Met:
    """What the nodes found of each other, and their clocks. `failed`: by label, of nodes that could not take part."""

    links: tuple[LinkFacts, ...]
    clocks: tuple[ClockSample, ...]
    failed: dict[str, str]


def main() -> None:
    """The process: a RunConfig as JSON on standard input; lines on standard output, see the top."""
    config = load_config(json.loads(sys.stdin.read()))
    try:
        for message in _examine(config):
            sys.stdout.buffer.write(encode(message) + b"\n")
            sys.stdout.buffer.flush()
    except Exception as error:  # whatever Ray raises, the parent shows its words
        print(f"{error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # Ray's own end may take seconds, and nothing is left to be ended but the actors, which end with us


def _examine(config: RunConfig) -> Iterator[Connected | Looks | Met]:
    _reach(config.cluster.address or "auto")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(address=config.cluster.address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    nodes = cluster_nodes(config.cluster)
    labels = _labels(nodes)
    yield Connected(nodes=nodes, labels=labels)
    probes = [_probe(node.id).remote(label) for node, label in zip(nodes, labels, strict=True)]
    text, towards = config.model_dump_json(), nodes[0].address
    refs = [probe.look.remote(text, towards) for probe in probes]
    found = _answers(refs, time.monotonic() + LOOK_S + _PROCESS_S)
    yield Looks(
        looks=tuple(
            decode(NodeLook, answer) if isinstance(answer, bytes) else _silent(label, answer)
            for label, answer in zip(labels, found, strict=True)
        )
    )
    there = {label: probe for label, probe, answer in zip(labels, probes, found, strict=True) if _is_bytes(answer)}
    yield _meet(there, config.cluster.interface, towards)


def _reach(address: str) -> None:
    """Ray tries for a minute where nobody listens; here it takes a moment. Raises ClusterError."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or "/" in host:
        return  # `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ClusterError(f"nothing answers at {address}: {error.strerror or error}") from error


def _labels(nodes: Sequence[ClusterNode]) -> tuple[str, ...]:
    names = [node.host if node.host == node.address else f"{node.host} ({node.address})" for node in nodes]
    return tuple(
        name if names.count(name) == 1 else f"{name} {node.id[:6]}" for name, node in zip(names, nodes, strict=True)
    )


def _probe(node_id: str) -> Any:
    """An actor class pinned to that node. It is sent by value: a node without our packages can then say so."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Probe:
        def __init__(self, label: str) -> None:
            self._label = label
            self._server: Any = None

        def look(self, config_json: str, towards: str) -> bytes:
            import json

            from dist_infer.config import load_config
            from dist_infer.messages import encode
            from launch.doctor.node import look_here

            return encode(look_here(self._label, load_config(json.loads(config_json)), towards))

        def now(self) -> float:
            import time

            return time.time()

        def listen(self, wanted: str | None, towards: str, token: bytes, most_peers: int) -> bytes:
            from dist_infer.interface import own_address
            from dist_infer.messages import encode
            from launch.doctor.network import EchoServer

            self._server = EchoServer(self._label, own_address(wanted, towards), token, most_peers)
            return encode(self._server.peer)

        def measure(self, peers: list[bytes], token: bytes, seconds: float) -> list[bytes]:
            from dist_infer.messages import decode, encode
            from launch.doctor.network import Peer, measure_links

            targets = [decode(Peer, peer) for peer in peers]
            return [encode(link) for link in measure_links(self._label, targets, token, seconds)]

    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=strategy)(Probe)


def _meet(probes: Mapping[str, Any], wanted: str | None, towards: str) -> Met:
    """Every node meets every other; all at the same time, in an order in which each is met by one at a time."""
    failed: dict[str, str] = {}
    clocks = _clocks(probes, failed)
    if len(probes) < 2:
        return Met(links=(), clocks=clocks, failed=failed)
    token = secrets.token_bytes(TOKEN_BYTES)
    listening = [probe.listen.remote(wanted, towards, token, 2 * len(probes)) for probe in probes.values()]
    peers: dict[str, bytes] = {}
    for label, answer in zip(probes, _answers(listening, time.monotonic() + _CLOCK_S * 2), strict=True):
        if isinstance(answer, bytes):
            peers[label] = answer
        else:
            failed[label] = answer
    names = list(peers)
    each_s = min(_MOST_EACH_S, _NETWORK_S / max(1, len(names) - 1))
    meeting = [
        probes[name].measure.remote([peers[other] for other in names[at + 1 :] + names[:at]], token, each_s)
        for at, name in enumerate(names)
    ]
    links: list[LinkFacts] = []
    for name, answer in zip(names, _answers(meeting, time.monotonic() + _NETWORK_S + _NEAR_S), strict=True):
        if isinstance(answer, list):
            links += [decode(LinkFacts, link) for link in answer]
        else:
            failed[name] = str(answer)
    return Met(links=tuple(links), clocks=clocks, failed=failed)


def _clocks(probes: Mapping[str, Any], failed: dict[str, str]) -> tuple[ClockSample, ...]:
    import ray

    samples = []
    for label, probe in probes.items():
        for _ in range(_NUM_CLOCK_SAMPLES):
            asked_s = time.time()
            try:
                node_s = ray.get(probe.now.remote(), timeout=_CLOCK_S)
            except Exception as error:
                failed[label] = f"it did not tell its time: {_brief(error)}"
                break
            samples.append(ClockSample(node=label, asked_s=asked_s, node_s=node_s, answered_s=time.time()))
    return tuple(samples)


def _answers(refs: Sequence[Any], deadline: float) -> list[Any]:
    """Of each its answer, or a text that says why there is none."""
    import ray

    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=max(0.0, deadline - time.monotonic()))
    there = set(ready)
    found: list[Any] = []
    for ref in refs:
        try:
            found.append(ray.get(ref) if ref in there else "it did not answer in time")
        except Exception as error:  # of the node's own code, or of Ray
            found.append(_brief(error))
    return found


def _is_bytes(answer: object) -> bool:
    return isinstance(answer, bytes)


def _silent(label: str, reason: str) -> NodeLook:
    return NodeLook(label=label, failed=(FailedCheck(check="node", reason=reason),))


def _brief(error: Exception) -> str:
    """The node's own error where it raised one; else Ray's last line."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
