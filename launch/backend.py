"""Ray as a backend: an embedded Ray for one run, or a cluster that is already there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from dist_infer.backend import PROCESS_FOOTPRINT_BYTES, Footprint, LoadProgress, RankSpec
from dist_infer.config import ClusterConfig
from dist_infer.config_types import ReaderKind
from dist_infer.engine.executor import Executor
from dist_infer.messages import decode, encode
from launch.root_guard import check_one_root
from partition.errors import ClusterError
from partition.hardware import HardwareFacts, NodeFacts
from partition.plan import Plan

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
        self._node_addresses: tuple[str, ...] = ()

    def facts(
        self, *, with_devices: bool, sample: Path | None, dtype: str | None, reader: ReaderKind = "threads"
    ) -> HardwareFacts:
        from dist_infer.machine import machine_facts

        if self._config.address is None:
            found = machine_facts(with_devices=with_devices, sample=sample, dtype=dtype, reader=reader)
            return HardwareFacts(nodes=(found,))
        self.start(world_size=0)
        return self._cluster_facts(with_devices, sample, dtype, reader)

    def footprint(self, tensor: int, pipeline: int) -> Footprint:
        launcher = PROCESS_FOOTPRINT_BYTES + RAY_FOOTPRINT_BYTES + _OBJECT_STORE_BYTES
        return Footprint(rank_bytes=PROCESS_FOOTPRINT_BYTES, launcher_bytes=launcher)

    def executor(self, spec: RankSpec, progress: LoadProgress) -> Executor:
        self.start(world_size=len(spec.plan.ranks))
        from launch.executor import RayExecutor

        return RayExecutor(
            spec,
            name=self._name,
            node_addresses=self._node_addresses,
            start_timeout_s=self._config.start_timeout,
            progress=progress,
        )

    def computes_here(self, plan: Plan) -> bool:
        return False

    def close(self) -> None:
        """End the embedded Ray with all its processes, or leave the cluster. Idempotent."""
        if self._started:
            import ray

            self._started = False
            ray.shutdown()

    def start(self, world_size: int) -> None:
        """Connect, or start the embedded Ray with room for so many ranks. Once; later calls do nothing."""
        if self._node_addresses:
            return
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
        from ray._raylet import Config  # type: ignore[attr-defined]

        if not ray.is_initialized():
            Config.initialize("")  # an earlier `import ray` has cached the environment from before

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
                ray.init(**options)
                if embedded:
                    _end_log_monitor()
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = "an embedded Ray" if embedded else f"the Ray cluster at {self._config.address}"
            raise ClusterError(f"could not reach or start {where}: {error}") from error
        self._node_addresses = tuple(sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]))

    def _cluster_facts(
        self, with_devices: bool, sample: Path | None, dtype: str | None, reader: ReaderKind
    ) -> HardwareFacts:
        """Each node measures itself, in a task pinned to it."""
        import ray
        from ray.exceptions import RayError

        refs = [
            _node_facts(address).remote(with_devices, None if sample is None else str(sample), dtype, reader)
            for address in self._node_addresses
        ]
        try:
            found: list[bytes] = ray.get(refs, timeout=_FACTS_TIMEOUT_S)
        except RayError as error:
            raise ClusterError(f"could not read the facts of the cluster's nodes: {error}") from error
        return HardwareFacts(nodes=tuple(decode(NodeFacts, data) for data in found))


def _end_log_monitor() -> None:
    """It reads all logs ten times a second to show them here, which is not wanted (`log_to_driver`)."""
    from ray._private import worker

    if (node := getattr(worker, "_global_node", None)) is not None:
        node.kill_log_monitor(check_alive=False)


def _node_facts(address: str) -> Any:
    import ray

    def read(with_devices: bool, sample: str | None, dtype: str | None, reader: ReaderKind) -> bytes:
        check_one_root()
        from dist_infer.machine import machine_facts

        there = sample is not None and Path(sample).exists()
        path = Path(str(sample)) if there else None
        found = machine_facts(with_devices=with_devices, sample=path, dtype=dtype, reader=reader)
        return encode(found)

    return ray.remote(num_cpus=0, resources={f"node:{address}": 0.001})(read)
