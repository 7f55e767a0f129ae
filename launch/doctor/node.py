"""All that one node can say of itself, gathered there within a deadline; every check on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from dist_infer.config import RunConfig
from dist_infer.machine import machine_facts
from launch.doctor.checkpoint import CheckpointFacts, read_checkpoint
from launch.doctor.devices import DeviceFacts, read_devices
from launch.doctor.disk import DiskFacts, DiskRate, measure_disk, read_disk
from launch.doctor.limits import LimitFacts, read_limits
from launch.doctor.network import InterfaceFacts, read_interface
from launch.doctor.running import Running
from launch.doctor.versions import VersionFacts, read_versions
from partition.errors import DistInferError
from partition.hardware import NodeFacts

T = TypeVar("T")
_CHECK_S = 5.0  # of each, and they run at the same time
_DISK_S = 3.0  # after them, so that measuring it is not disturbed
LOOK_S = _CHECK_S + 2 * _DISK_S


@dataclass(frozen=True, kw_only=True)
class FailedCheck:
    """A check that did not end, or raised."""

    check: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class NodeLook:
    """What one node found; None where a check failed or was not wanted. `label` is how findings name it."""

    label: str
    versions: VersionFacts | None = None
    hardware: NodeFacts | None = None
    disk: DiskFacts | None = None
    rate: DiskRate | None = None
    devices: DeviceFacts | None = None
    limits: LimitFacts | None = None
    checkpoint: CheckpointFacts | None = None
    interface: InterfaceFacts | None = None
    failed: tuple[FailedCheck, ...] = ()


def look_here(label: str, config: RunConfig, towards: str | None = None) -> NodeLook:
    """Of this machine, in at most LOOK_S. towards: address of the coordinator's node, where there are several nodes."""
    failed: list[FailedCheck] = []

    def begin(check: str, work: Callable[[], T], limit_s: float = _CHECK_S) -> Running[T]:
        return Running(work, limit_s=limit_s, name=check)

    def end(check: str, running: Running[T] | None) -> T | None:
        try:
            return None if running is None else running.result()
        except Exception as error:  # whatever it is, the other checks go on
            failed.append(FailedCheck(check=check, reason=_words(error)))
            return None

    with_devices = config.cluster.device != "cpu"
    versions = begin("versions", read_versions)
    hardware = begin("memory", lambda: machine_facts(with_devices=with_devices))
    limits = begin("limits", read_limits)
    devices = begin("devices", read_devices) if with_devices else None
    checkpoint = begin("checkpoint", lambda: read_checkpoint(config))
    interface = None
    if towards is not None:
        interface = begin("network", lambda: read_interface(config.cluster.interface, towards))
    look = NodeLook(
        label=label,
        versions=end("versions", versions),
        hardware=end("memory", hardware),
        limits=end("limits", limits),
        devices=end("devices", devices),
        checkpoint=end("checkpoint", checkpoint),
        interface=end("network", interface),
    )
    own = look.checkpoint.store if look.checkpoint is not None else ""
    store = Path(own or config.offload.store)
    disk = end("disk", begin("disk", lambda: read_disk(store), _DISK_S))
    rate = None
    if disk is not None:
        rate = end("disk", begin("disk-rate", lambda: measure_disk(store, disk), _DISK_S))
    return replace(look, disk=disk, rate=rate, failed=tuple(failed))


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError | OSError | DistInferError):
        return str(error)
    return f"{type(error).__name__}: {error}"
