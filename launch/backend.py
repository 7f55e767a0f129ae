"""Ray as a backend: an embedded Ray for one run, or a cluster that is already there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_infer.backend import PROCESS_FOOTPRINT_BYTES, Footprint, OnStep, RankSpec
from dist_infer.config import ClusterConfig
from dist_infer.config_types import ReaderKind
from dist_infer.engine.executor import Executor
from dist_infer.messages import decode, encode
from dist_infer.node_store import NodeStore, PackHere, PackOrder, PackProgress
from launch.head_watch import HeadWatch, ask_cluster, ask_own
from launch.ray_start import keep_standard_output, own_machine
from launch.raylet import KEEP_ENVIRONMENT, end_orphans, own_raylet
from launch.root_guard import check_one_root
from launch.runs.mark import run_label
from partition.errors import ClusterError
from partition.hardware import HardwareFacts, NodeFacts
from partition.plan import Plan

if TYPE_CHECKING:
    from launch.nodes import ClusterNode

# Resident memory of Ray's own processes on a node (GCS, raylet, agents), measured with benchmarks/footprint.py.
RAY_FOOTPRINT_BYTES = 400 << 20
_OBJECT_STORE_BYTES = 80 << 20  # messages are small; weights and activations never go through it
_FACTS_TIMEOUT_S = 60
# Of a Ray for one run on one machine. It looks after thousands of nodes and tasks, and while it does, ranks' threads
# that wait for each other stand still: 0.48 s of a core in 10 s without these, 0.30 with (decision 0021).
_QUIET = {
    "RAY_enable_metrics_collection": "0",  # ours are at /metrics
    "RAY_event_stats": "0",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "5000",
    "RAY_kill_idle_workers_interval_ms": "1000",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "10000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_report_worker_backlog_interval_ms": "10000",
    "RAY_task_events_report_interval_ms": "0",  # the history of tasks, which nobody asks for
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "AUTOSCALER_UPDATE_INTERVAL_S": "60",
    "METRICS_RECORD_INTERVAL_S": "60",
    KEEP_ENVIRONMENT: "1",
}


class RayBackend:
    """Connects to `cluster.address`, or starts a Ray on this machine that ends with the run.

    Ray starts with the first call that needs it (`executor`, or `facts` of an existing cluster), so that a plan that
    does not fit has started nothing.
    """

    def __init__(self, config: ClusterConfig, name: str) -> None:
        check_one_root()
        self._config, self._name = config, name
        self._started = False
        self._nodes: tuple[ClusterNode, ...] = ()
        self._shunned: frozenset[str] = frozenset()  # nodes that Ray still has, but that do not answer
        self._head: HeadWatch | None = None  # of the Ray that was started or found

    def facts(
        self,
        *,
        with_devices: bool,
        sample: Mapping[int, Path] | None,
        dtype: str | None,
        reader: ReaderKind = "threads",
    ) -> HardwareFacts:
        """Without a sample the nodes are looked up anew: numbers of nodes are those of the last such call."""
        from dist_infer.machine import machine_facts

        if self._config.address is None:
            found = machine_facts(with_devices=with_devices, sample=(sample or {}).get(0), dtype=dtype, reader=reader)
            return HardwareFacts(nodes=(found,))
        self.start(world_size=0)
        if sample is None:
            self._look_up_nodes()
        return self._cluster_facts(with_devices, sample or {}, dtype, reader)

    def pack(self, order: PackOrder, here: PackHere, progress: PackProgress) -> Mapping[int, NodeStore]:
        if self._config.address is None:
            return {0: here(order.units[0])}
        (first, *others) = order.units
        if not others and self._nodes[first].is_here:
            return {first: here(order.units[first])}  # a process less
        from launch.packing import pack_on_nodes

        return pack_on_nodes(order, self._nodes, progress, silence_s=self._config.start_timeout)

    def footprint(self, tensor: int, pipeline: int) -> Footprint:
        launcher = PROCESS_FOOTPRINT_BYTES + RAY_FOOTPRINT_BYTES + _OBJECT_STORE_BYTES
        return Footprint(rank_bytes=PROCESS_FOOTPRINT_BYTES, launcher_bytes=launcher)

    def drop_lost_nodes(self, plan: Plan, ended: Mapping[int, Sequence[int]]) -> tuple[str, ...]:
        from launch.lost_nodes import find_lost, wait_for_ends

        if self._config.address is None:  # its one node is this one
            if self.is_lost:
                self.close()  # `executor` starts another Ray
            wait_for_ends([pid for pids in ended.values() for pid in pids])
            return ()
        if self._head is not None:
            self._head.wait_for_answer()
        used = sorted({rank.node for rank in plan.ranks})
        lost = find_lost({self._nodes[node]: ended.get(node, ()) for node in used})
        self._shunned = frozenset(node.id for node in lost)
        return tuple(f"{node.host} ({node.address})" for node in lost)

    def executor(self, spec: RankSpec, on_step: OnStep) -> Executor:
        head = self.start(world_size=len(spec.plan.ranks))
        from launch.executor import RayExecutor

        return RayExecutor(
            spec,
            name=run_label(self._name),
            nodes=self._nodes,
            start_timeout_s=self._config.start_timeout,
            heartbeat_timeout_s=self._config.heartbeat_timeout,
            on_step=on_step,
            head=head,
            node_resources=self._config.node_resources,
            interface=self._config.interface,
        )

    def computes_here(self, plan: Plan) -> bool:
        return False

    def close(self) -> None:
        """End the embedded Ray with all its processes, or leave the cluster. Idempotent; `start` begins anew."""
        lost = self._head is not None and self._head.is_lost
        if self._head is not None:
            self._head.stop()
        self._head, self._nodes = None, ()
        if self._started:
            import ray

            self._started = False
            raylet = own_raylet() if lost and self._config.address is None else None
            ray.shutdown()
            if raylet is not None:
                end_orphans(raylet)

    def raise_if_lost(self) -> None:
        """ClusterError when Ray itself is gone, ClusterGoneError when that cannot be mended by closing and starting."""
        if self._head is not None:
            self._head.raise_if_lost()

    @property
    def is_lost(self) -> bool:
        return self._head is not None and self._head.is_lost

    @property
    def grace_s(self) -> float:
        """Once it is lost: how long this process may go on."""
        return 0.0 if self._head is None else self._head.grace_s

    def start(self, world_size: int) -> HeadWatch:
        """Connect, or start the embedded Ray with room for so many ranks. Once; later calls do nothing."""
        if self._head is not None:
            return self._head
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        embedded = self._config.address is None
        if embedded:  # an existing cluster has its own rule, which Ray finds out from the user's environment and token
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            for variable, value in _QUIET.items():
                os.environ.setdefault(variable, value)
            os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15: ranks would wait for whatever else runs
            if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # for this run alone; children inherit it
        import ray
        from ray import _raylet

        if not ray.is_initialized():  # an earlier `import ray` has cached the environment from before, and its token
            _raylet.Config.initialize("")  # type: ignore[attr-defined]
            if (tokens := getattr(_raylet, "AuthenticationTokenLoader", None)) is not None:  # not in older versions
                tokens.instance().reset_cache()

        if embedded and ray.is_initialized():
            raise ClusterError(
                "this process is connected to a Ray already, so a new one cannot be started: set cluster.address: auto "
                "to use it, or call ray.shutdown() first"
            )
        already = ray.is_initialized()  # then it is somebody else's to shut down
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        if embedded:
            options |= {
                "address": "local",
                "num_cpus": max(world_size, os.cpu_count() or 1),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        else:
            options["address"] = self._config.address
        self._started = not already
        try:
            if not already:
                keep_standard_output()
                with own_machine(only=embedded):
                    ray.init(**options)
                if embedded:
                    _end_onlookers()
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = "an embedded Ray" if embedded else f"the Ray cluster at {self._config.address}"
            raise ClusterError(f"could not reach or start {where}: {error}") from error
        self._look_up_nodes()
        self._head = HeadWatch(ask_own() if embedded else ask_cluster(), is_ours=embedded)
        self._head.start()
        return self._head

    def _look_up_nodes(self) -> None:
        from launch.nodes import cluster_nodes

        self._nodes = tuple(node for node in cluster_nodes(self._config) if node.id not in self._shunned)

    def _cluster_facts(
        self, with_devices: bool, sample: Mapping[int, Path], dtype: str | None, reader: ReaderKind
    ) -> HardwareFacts:
        """Each node measures itself, in a task pinned to it."""
        import ray
        from ray.exceptions import RayError

        refs = []
        for index, node in enumerate(self._nodes):
            path = str(sample[index]) if index in sample else None
            # of a node without ranks nothing is measured
            kind = dtype if path is not None or not sample else None
            refs.append(_node_facts(node).remote(with_devices, node.num_gpus, path, kind, reader))
        try:
            found: list[bytes] = ray.get(refs, timeout=_FACTS_TIMEOUT_S)
        except RayError as error:
            raise ClusterError(f"could not read the facts of the cluster's nodes: {error}") from error
        facts = [decode(NodeFacts, data) for data in found]
        limited = [replace(own, max_ranks=node.max_ranks) for own, node in zip(facts, self._nodes, strict=True)]
        return HardwareFacts(nodes=tuple(limited))


def _end_onlookers() -> None:
    """What a Ray of one machine and one run starts and nobody asks: two of them 126 MB (PSS), beside the third.

    The log monitor reads all logs ten times a second to show them here, which is not wanted (`log_to_driver`); the
    monitor would start other nodes; the dashboard's server, there without a dashboard too, tells what `status` does.
    """
    from ray._private import worker

    if (node := getattr(worker, "_global_node", None)) is not None:
        node.kill_log_monitor(check_alive=False)
        node.kill_monitor(check_alive=False)
        node.kill_dashboard(check_alive=False)


def _node_facts(node: ClusterNode) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def read(with_devices: bool, num_gpus: int, sample: str | None, dtype: str | None, reader: ReaderKind) -> bytes:
        check_one_root()
        from dist_infer.machine import machine_facts

        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            del os.environ["CUDA_VISIBLE_DEVICES"]  # Ray hides them all from a task that takes none
        path = None if sample is None else Path(sample)
        found = machine_facts(with_devices=with_devices and num_gpus > 0, sample=path, dtype=dtype, reader=reader)
        return encode(replace(found, devices=found.devices[:num_gpus]))

    pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=pinned)(read)
