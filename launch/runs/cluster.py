"""A run's parts in a Ray cluster that was there before it: found by the run's label, removed behind its driver."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.ray_start import own_machine
from partition.errors import ClusterError

_ANSWER_S = 30.0
_KNOCK_S = 5.0


def clear_cluster(address: str, label: str) -> None:
    """Remove the application, the named actors and the placement groups of that label. Raises ClusterError."""
    with connected(address) as ray:
        _delete_application(label)
        for found in ray.util.list_named_actors(all_namespaces=True):
            if str(found["name"]).startswith(label):
                with contextlib.suppress(ValueError):  # gone by itself
                    ray.kill(ray.get_actor(found["name"], namespace=found["namespace"]))
        _remove_groups(label)


def read_worker_log(address: str, line: str, error: bool, offsets: dict[str, int]) -> list[tuple[str, str]]:
    """(node, new text) of the newest log that begins with `line`, from every node; offsets by node, kept up to date.

    Raises ClusterError.
    """
    with connected(address) as ray:
        nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        read = ray.remote(num_cpus=0)(_read_on_node)
        asked = {
            node: read.options(resources={f"node:{node}": 0.001}).remote(line, error, offsets.get(node, 0))
            for node in nodes
        }
        found = []
        for node, ref in asked.items():
            text, end = ray.get(ref, timeout=_ANSWER_S)
            offsets[node] = end
            if text:
                found.append((node, text))
        return found


def _read_on_node(line: str, error: bool, offset: int) -> tuple[str, int]:
    import ray

    from launch.runs.logs import newest_worker_log

    file = newest_worker_log(_logs_of(ray), line, error=error)
    if file is None:
        return "", offset
    with file.open("rb") as handle:
        handle.seek(offset)
        data = handle.read()
    return data.decode(errors="replace"), offset + len(data)


def logs_directory() -> str:
    """Where the Ray that this process is connected to writes on this machine."""
    import ray

    return str(_logs_of(ray))


def _logs_of(ray: Any) -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path())


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to that cluster; inside of it another one costs nothing.

    Raises ClusterError, also for what Ray raises inside.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.exceptions import RayError

    already = ray.is_initialized()
    try:
        if not already:
            _knock(address)
            with own_machine(only=False):
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"could not reach the Ray cluster at {address}: {error}") from error
    try:
        yield ray
    except (RayError, TimeoutError) as error:
        raise ClusterError(f"the Ray cluster at {address} does not answer: {error}") from error
    finally:
        if not already:
            ray.shutdown()


def _knock(address: str) -> None:
    """OSError when nobody listens there: Ray itself takes minutes to find that out."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def _delete_application(label: str) -> None:
    from ray import serve

    if label in serve.status().applications:
        serve.delete(label)


def _remove_groups(label: str) -> None:
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    table: dict[str, dict[str, Any]] = placement_group_table()
    for group_id, group in table.items():
        if str(group["name"]).startswith(f"{label}-") and group["state"] != "REMOVED":
            with contextlib.suppress(ray.exceptions.RayError):
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))


def main() -> None:
    """`python -m launch.runs.cluster ADDRESS LABEL` clears; an error is the last line on stderr."""
    try:
        clear_cluster(*sys.argv[1:])
    except ClusterError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
