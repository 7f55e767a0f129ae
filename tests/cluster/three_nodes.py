"""Three Ray nodes on this machine, chosen by labels and resources; one is lost. Prints what was found as JSON.

python three_nodes.py MODEL STORE
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from dist_infer import LLM, SamplingParams
from dist_infer.config import ClusterConfig
from dist_infer.errors import DistInferError
from launch.nodes import ClusterNode, cluster_nodes
from launch.placement import ask_for_stage, rank_resources, wait_for_stage

PROMPTS = [[5, 6, 7, 8], [9, 10]]


def section(**keys: Any) -> ClusterConfig:
    return ClusterConfig(executor="ray", address="auto", device="cpu", **keys)


def shown(nodes: tuple[ClusterNode, ...]) -> list[list[Any]]:
    return [[names[node.id], node.max_ranks] for node in nodes]


def error_of(config: ClusterConfig) -> str:
    try:
        cluster_nodes(config)
    except DistInferError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_file(model: str, store: str) -> dict[str, Any]:
    return {
        "name": "three",
        "model": {"path": model, "dtype": "float32"},
        "parallel": {"pipeline": 2},
        "offload": {"store": store, "host_memory": "64 MiB", "reader": "threads"},
        "engine": {"kv_memory": "1 MiB", "max_batch_tokens": 16, "max_requests": 2, "max_model_len": 64},
        "cluster": {
            "executor": "ray",
            "address": "auto",
            "device": "cpu",
            "node_labels": {"tier": "ranks"},
            "node_resources": {"llm": 1},
        },
    }


cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
a = cluster.add_node(num_cpus=4, resources={"llm": 1}, labels={"tier": "ranks"})
b = cluster.add_node(num_cpus=2, resources={"llm": 8}, labels={"tier": "ranks"})
other = cluster.add_node(num_cpus=8, resources={"llm": 8}, labels={"tier": "other"})
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
names = {cluster.head_node.node_id: "head", a.node_id: "a", b.node_id: "b", other.node_id: "other"}
found: dict[str, Any] = {
    "any": sorted(shown(cluster_nodes(section()))),
    "labelled": shown(cluster_nodes(section(node_labels={"tier": "ranks"}))),
    "given": shown(cluster_nodes(section(node_labels={"tier": "ranks"}, node_resources={"llm": 1}))),
    "unlabelled": error_of(section(node_labels={"tier": "none"})),
    "too much": error_of(section(node_resources={"llm": 9})),
}
llm = LLM(run_file(sys.argv[1], sys.argv[2]))
with llm:
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    found["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    found["places"] = [
        [names[node] for node in group["bundles_to_node_id"].values()]
        for group in placement_group_table().values()
        if group["state"] == "CREATED"
    ]
    found["packed"] = [llm.gang.pack_report.num_written, llm.gang.pack_report.num_reused]
    plan = llm.plan
blobs = list(Path(sys.argv[2]).glob("*/*.bin"))
found["blobs"] = len(blobs)
nodes = cluster_nodes(section(node_labels={"tier": "ranks"}))
gone = a if nodes[plan.ranks[-1].node].id == a.node_id else b  # they have one address, and go by their ids then
found["gone"] = names[gone.node_id]
cluster.remove_node(gone)
while any(node["Alive"] and node["NodeID"] == gone.node_id for node in ray.nodes()):
    time.sleep(0.1)  # the test that runs this has a deadline
group = ask_for_stage(plan, 1, nodes, "lost", resources := rank_resources(plan, {}))
try:
    wait_for_stage(group, plan, 1, nodes, resources, deadline=float("inf"))
except DistInferError as error:
    found["lost"] = str(error)
found["left"] = shown(cluster_nodes(section(node_labels={"tier": "ranks"})))
ray.shutdown()
cluster.shutdown()
print(json.dumps(found))
