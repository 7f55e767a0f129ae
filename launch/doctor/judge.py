"""What all nodes found, put together with the plan that is made from it, as findings. Starts and asks nothing."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace

from dist_infer.config import RunConfig
from dist_infer.serve_config import ServeConfig
from dist_infer.startup import Model
from launch.doctor.checkpoint import judge_checkpoints
from launch.doctor.clock import judge_clocks
from launch.doctor.cluster import ClusterLook
from launch.doctor.devices import judge_devices
from launch.doctor.disk import is_shared, judge_disk, judge_rate
from launch.doctor.finding import Finding, error, not_run, refused, warning
from launch.doctor.limits import judge_limits
from launch.doctor.memory import judge_memory
from launch.doctor.network import judge_interfaces, judge_links
from launch.doctor.node import NodeLook
from launch.doctor.planning import Planned, plan_for
from launch.doctor.ports import check_port
from launch.doctor.running import Running
from launch.doctor.versions import judge_versions, read_versions
from offload.format import blob_file
from partition.errors import DistInferError
from partition.hardware import ASSUMED_DISK_BYTES_PER_S, NodeFacts
from partition.plan import Plan

_HERE = "this process"


class Judge:
    """Puts together what belongs together: facts of nodes, and the plan that is made from them."""

    def __init__(self, config: RunConfig, looks: tuple[NodeLook, ...], cluster: ClusterLook | None) -> None:
        self._config, self._looks, self._cluster = config, looks, cluster
        self._hardware = self._planned_with()

    def findings(self, opening: Running[Model]) -> list[Finding]:
        found = self._not_answered()
        model: Model | None = None
        try:
            model = opening.result()
        except DistInferError as caught:
            found.append(refused("checkpoint", caught, why="without the model nothing can be planned or started"))
        except Exception as caught:
            found.append(not_run("checkpoint", "", f"{type(caught).__name__}: {caught}"))
        planned = self._plan(model)
        plan, used = planned.plan, planned.used
        found += self._versions()
        if model is not None:
            checkpoints = {look.label: look.checkpoint for look in self._looks if look.checkpoint is not None}
            if checkpoints:
                found += judge_checkpoints(checkpoints, here=next(iter(checkpoints)), used=used)
        found += planned.findings
        if plan is not None:
            facts = {at: (node.name, node.memory_bytes, node.memory_source) for at, node in enumerate(self._hardware)}
            found += judge_memory(plan, facts)
        found += self._disks(planned)
        found += self._devices(planned)
        if self._cluster is not None:
            found += self._network(planned)
        found += self._limits(planned)
        if isinstance(self._config.run, ServeConfig):
            here = self._looks[0].label if self._looks else socket.gethostname()
            found.append(check_port(here, self._config.run))
        return found

    def _planned_with(self) -> tuple[NodeFacts, ...]:
        """Of all nodes in their order, with the GPUs and ranks that the cluster gives; empty if one did not tell."""
        found = []
        nodes = self._cluster.connected.nodes if self._cluster is not None and self._cluster.connected else None
        for at, look in enumerate(self._looks):
            if look.hardware is None:
                return ()
            own = replace(look.hardware, name=look.label)
            if nodes is not None:
                own = replace(own, max_ranks=nodes[at].max_ranks, devices=own.devices[: nodes[at].num_gpus])
            found.append(own)
        return tuple(found)

    def _plan(self, model: Model | None) -> Planned:
        if model is None or not self._hardware:
            return Planned(plan=None, used=frozenset(look.label for look in self._looks))
        disks = [look.rate.bytes_per_s if look.rate is not None else None for look in self._looks]
        met = self._cluster.met if self._cluster is not None else None
        return plan_for(self._config, model, self._hardware, disks, met.links if met is not None else ())

    def _not_answered(self) -> list[Finding]:
        """Checks that did not run, nodes that did not answer, a cluster that was not reached."""
        found = []
        if self._cluster is not None and self._cluster.problem:
            if self._cluster.looks is None:
                found.append(_unreached(self._config, self._cluster))
            else:
                found.append(not_run("network", "", self._cluster.problem))
        for look in self._looks:
            for failed in look.failed:
                if failed.check == "node":
                    found.append(_silent(look.label, failed.reason))
                else:
                    found.append(not_run(failed.check, look.label, failed.reason))
        return found

    def _versions(self) -> list[Finding]:
        found = {look.label: look.versions for look in self._looks if look.versions is not None}
        needs_ray = self._config.cluster.executor == "ray" or isinstance(self._config.run, ServeConfig)
        if self._cluster is None:
            return judge_versions(found, here=next(iter(found)), needs_ray=needs_ray) if found else []
        return judge_versions({_HERE: read_versions(), **found}, here=_HERE, needs_ray=needs_ray)

    def _disks(self, planned: Planned) -> list[Finding]:
        needed = self._needed(planned.plan)
        found = []
        for at, look in enumerate(self._looks):
            if look.disk is None or look.label not in planned.used:
                continue
            found += judge_disk(look.label, look.disk, needed.get(at))
            if look.rate is not None:
                assumed = self._hardware[at].disk_bytes_per_s if self._hardware else ASSUMED_DISK_BYTES_PER_S
                found.append(judge_rate(look.label, look.rate, assumed=assumed, effect=planned.disk_effect))
        return found

    def _needed(self, plan: Plan | None) -> Mapping[int, Mapping[str, int]]:
        """By node the blobs of its store and their bytes: its ranks' own; of a shared store those of all that share."""
        if plan is None or any(look.checkpoint is None or not look.checkpoint.store for look in self._looks):
            return {}  # a store without a name: its weights are not there yet
        own: dict[int, dict[str, int]] = {at: {} for at in range(len(self._looks))}
        for rank in plan.ranks:
            own[rank.node].update({blob_file(unit.name, rank.tp_rank): unit.num_bytes for unit in rank.units})
        shared: dict[tuple[str, str], dict[str, int]] = {}
        for at, look in enumerate(self._looks):
            if look.disk is not None and is_shared(look.disk):
                group = shared.setdefault((look.disk.kind, look.disk.device), {})
                group.update(own[at])
                own[at] = group
        return own

    def _devices(self, planned: Planned) -> list[Finding]:
        found = {look.label: look.devices for look in self._looks if look.devices is not None}
        plan = planned.plan
        if self._config.cluster.device == "cuda" or (plan is not None and plan.device == "cuda"):
            used = {label: facts for label, facts in found.items() if label in planned.used}
            return judge_devices(used, here=next(iter(used))) if used else []
        unused = [label for label, facts in found.items() if facts.devices]
        if plan is None or not unused:
            return []
        return [
            warning(
                "devices",
                ", ".join(unused),
                "cluster.device: auto takes the CPUs of all nodes, since not every node has a GPU",
                why="the GPUs that are there stay idle",
                do="choose the nodes that have GPUs with cluster.node_labels, or say cluster.device: cpu",
            )
        ]

    def _network(self, planned: Planned) -> list[Finding]:
        found = judge_interfaces({look.label: look.interface for look in self._looks if look.interface is not None})
        if self._cluster is None or self._cluster.met is None:
            return found
        met = self._cluster.met
        found += judge_links(met.links, planned.used, effect=planned.network_effect)
        found += [not_run("network", label, reason) for label, reason in met.failed.items()]
        return found + judge_clocks(met.clocks)

    def _limits(self, planned: Planned) -> list[Finding]:
        run, cluster = self._config.run, self._config.cluster
        uses_ray = cluster.executor == "ray" or isinstance(run, ServeConfig)
        plan = planned.plan
        found = []
        for at, look in enumerate(self._looks):
            if look.limits is None:
                continue
            serves = isinstance(run, ServeConfig) and at == 0
            found += judge_limits(
                look.label,
                look.limits,
                num_blobs=_most_blobs(plan, at, together=cluster.executor == "local"),
                num_connections=run.limits.max_connections if isinstance(run, ServeConfig) and serves else 0,
                uses_ray=uses_ray,
                is_raised=uses_ray and cluster.address is None,
                uses_rdma=plan is not None and plan.device == "cuda" and len(planned.used) > 1,
            )
        return found


def _most_blobs(plan: Plan | None, node: int, *, together: bool) -> int:
    """Files of the store that one process holds open. together: all stages of a tp_rank are in one process."""
    counts: dict[int, int] = {}
    for rank in plan.ranks if plan is not None else ():
        if rank.node == node:
            process = rank.tp_rank if together else rank.rank
            counts[process] = counts.get(process, 0) + len(rank.units)
    return max(counts.values(), default=0)


def _unreached(config: RunConfig, cluster: ClusterLook) -> Finding:
    return error(
        "cluster",
        "",
        f"the Ray cluster at {config.cluster.address} could not be examined: {cluster.problem}",
        why="the ranks are to run there",
        do="look whether Ray runs there (`ray status`), whether this machine may reach it, and whether RAY_AUTH_MODE "
        "and the token are those of the cluster; without cluster.address a Ray is started here",
    )


def _silent(label: str, reason: str) -> Finding:
    return error(
        "node",
        label,
        f"the node could not look at itself: {reason}",
        why="ranks there would fail in the same way, or not start at all",
        do="look whether dist-infer is installed for the Python of `ray start` there, and whether the node still "
        "answers; `ray list nodes` shows its state",
    )
