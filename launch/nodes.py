"""The nodes of a Ray cluster that may take ranks, in the order in which stages are placed on them."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_infer.config import ClusterConfig
from partition.errors import ClusterError, ConfigError

_CPUS_PER_RANK = 1.0


@dataclass(frozen=True, kw_only=True)
class ClusterNode:
    """One node. `id` is Ray's, for pinning tasks and placement groups; several nodes may have one address (in tests).

    `max_ranks`: what its Ray resources are enough for; 0: it only runs the coordinator. `num_gpus`: as Ray counts them.
    """

    id: str
    address: str
    host: str
    is_here: bool
    max_ranks: int
    num_gpus: int


def cluster_nodes(config: ClusterConfig) -> tuple[ClusterNode, ...]:
    """The living nodes that `cluster.node_labels` and `.node_resources` allow, this one first, then by address.

    This node is there in any case, as what the coordinator takes is counted on the first. Ray must be connected.

    Raises:
        ConfigError: no node is allowed: names what is missing where.
    """
    import ray

    own_id = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    if not alive:
        raise ClusterError("the Ray cluster has no living node: see `ray status`, or start one with `ray start`")
    wanting = {node["NodeID"]: _wanting(node, config) for node in alive}
    found = [_node(node, own_id, config, wanting[node["NodeID"]]) for node in alive]
    if not any(node.max_ranks for node in found):
        there = "; ".join(f"{node['NodeManagerHostname']} {wanting[node['NodeID']]}" for node in alive)
        raise ConfigError(
            f"no node of the Ray cluster may take a rank: {there}. Change cluster.node_labels or "
            "cluster.node_resources, or start nodes that have them (`ray start --labels=… --resources=…`)"
        )
    found = [node for node in found if node.max_ranks or node.is_here]
    return tuple(sorted(found, key=lambda node: (not node.is_here, _address_order(node.address), node.id)))


def _node(node: Mapping[str, Any], own_id: str, config: ClusterConfig, wanting: str) -> ClusterNode:
    resources = node["Resources"]
    needs = {"CPU": _CPUS_PER_RANK, **config.node_resources}
    shares = [int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items()]
    return ClusterNode(
        id=node["NodeID"],
        address=node["NodeManagerAddress"],
        host=node["NodeManagerHostname"],
        is_here=node["NodeID"] == own_id,
        max_ranks=0 if wanting else min(shares),
        num_gpus=int(resources.get("GPU", 0.0)),
    )


def _wanting(node: Mapping[str, Any], config: ClusterConfig) -> str:
    """What keeps ranks from a node, in words; empty where nothing does."""
    labels, resources = node.get("Labels") or {}, node["Resources"]
    for name, value in config.node_labels.items():
        if labels.get(name) != value:
            there = f"{name}={labels[name]}" if name in labels else f"no label {name}"
            return f"has {there}, not {name}={value}"
    for name, amount in {"CPU": _CPUS_PER_RANK, **config.node_resources}.items():
        if resources.get(name, 0.0) < amount:
            return f"has {resources.get(name, 0.0):g} {name}, a rank needs {amount:g}"
    return ""


def _address_order(address: str) -> tuple[int, int | str]:
    try:
        return (0, int(ipaddress.ip_address(address)))
    except ValueError:
        return (1, address)
