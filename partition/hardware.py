"""What the machines have: measured, or written by hand in YAML, so that a large cluster can be planned on a laptop.

network_per_s: 10 GB
nodes:
  - name: big
    count: 16              # big-0 … big-15
    cores: 64
    memory: 512 GiB
    disk_per_s: 6 GB
    flops: 4e12
    memory_per_s: 300 GB
    layer_overhead_s: 0.0007
    devices:
      - {name: H100, count: 8, memory: 80 GiB, link_per_s: 50 GB, flops: 400e12, memory_per_s: 3 TB}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partition.errors import ConfigError
from partition.sizes import parse_size
from partition.yaml_loader import parse_yaml

ASSUMED_DISK_BYTES_PER_S = 2e9
ASSUMED_NETWORK_BYTES_PER_S = 1.25e9
ASSUMED_CORE_FLOPS = 1e11  # bf16 matmul, a core with wide vectors
ASSUMED_MEMORY_BYTES_PER_S = 20e9
ASSUMED_DEVICE_FLOPS = 100e12
ASSUMED_DEVICE_BYTES_PER_S = 1e12
ASSUMED_LINK_BYTES_PER_S = 20e9
ASSUMED_LAYER_OVERHEAD_S = {"cpu": 0.7e-3, "cuda": 0.1e-3}  # calls and small kernels of a layer, whatever its size
ASSUMED_ALL_REDUCE_S = {"cpu": 1e-3, "cuda": 30e-6}  # of a decode step's hidden states: latency, not bytes
_MAX_COUNT = 4096


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """One accelerator. `link_bytes_per_s`: host to device."""

    name: str
    memory_bytes: int
    link_bytes_per_s: float = ASSUMED_LINK_BYTES_PER_S
    flops: float = ASSUMED_DEVICE_FLOPS
    memory_bytes_per_s: float = ASSUMED_DEVICE_BYTES_PER_S


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One machine. `memory_bytes` is what may be used, `memory_source` says whose limit that is.

    `flops` and `memory_bytes_per_s` are those of the CPU. `layer_overhead_s`: what a layer costs for a micro-batch of
    any size; None: assumed. `reader`: what reads its disk at that rate, and why that one was taken. `assumed` names the
    other figures nobody measured or wrote. `max_ranks`: the most that whoever shares out the cluster lets it run; None:
    any number.
    """

    name: str
    cores: int
    memory_bytes: int
    memory_source: str
    devices: tuple[DeviceFacts, ...]
    disk_bytes_per_s: float
    flops: float
    memory_bytes_per_s: float
    layer_overhead_s: float | None = None
    reader: str = "threads"
    reader_reason: str = ""
    assumed: tuple[str, ...] = ()
    max_ranks: int | None = None


@dataclass(frozen=True, kw_only=True)
class HardwareFacts:
    """The cluster. `network_bytes_per_s`: between any two nodes."""

    nodes: tuple[NodeFacts, ...]
    network_bytes_per_s: float = ASSUMED_NETWORK_BYTES_PER_S


def load_hardware(path: Path) -> HardwareFacts:
    """Read the YAML above. Raises ConfigError naming the file and key for anything unknown, missing or senseless."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the hardware file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the hardware file {path} is not YAML: {error}") from error
    try:
        data = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"the hardware file {path} is {error}") from None
    section = _Section(f"{path}", data)
    section.only("nodes", "network_per_s")
    nodes = tuple(node for child in section.children("nodes") for node in _nodes(child, path))
    names = [node.name for node in nodes]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: two nodes have the same name: {', '.join(sorted(names))}")
    if not nodes:
        raise ConfigError(f"{path}: 'nodes' is empty, at least one node is needed")
    return HardwareFacts(
        nodes=nodes, network_bytes_per_s=section.rate("network_per_s", ASSUMED_NETWORK_BYTES_PER_S, [])
    )


@dataclass(frozen=True)
class _Section:
    """One mapping of the file, with its place for error messages."""

    place: str
    data: Any

    def only(self, *known: str) -> None:
        if not isinstance(self.data, Mapping):
            raise ConfigError(f"{self.place}: expected keys {', '.join(known)}, got {self.data!r}")
        for key in self.data:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                raise ConfigError(f"{self.place}: unknown key {key!r}{hint}")

    def children(self, key: str) -> list[_Section]:
        rows = self.data.get(key, [])
        if not isinstance(rows, list):
            raise ConfigError(f"{self.place}: {key!r} must be a list")
        return [_Section(f"{self.place}: {key}[{i}]", row) for i, row in enumerate(rows)]

    def text(self, key: str, default: str) -> str:
        value = self.data.get(key, default)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{self.place}: {key!r} must be text, not {value!r}")
        return value

    def count(self, key: str, default: int) -> int:
        value = self.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_COUNT:
            raise ConfigError(f"{self.place}: {key!r} must be a whole number from 1 to {_MAX_COUNT}, not {value!r}")
        return value

    def size(self, key: str) -> int:
        if key not in self.data:
            raise ConfigError(f"{self.place}: {key!r} is missing: write a size such as '64 GiB'")
        return self._size(key)

    def rate(self, key: str, default: float, assumed: list[str]) -> float:
        """Bytes per second, > 0; a missing key takes the default and is added to `assumed`."""
        if key not in self.data:
            assumed.append(key)
            return default
        value = float(self._size(key))
        if value <= 0:
            raise ConfigError(f"{self.place}: {key!r} must be more than 0")
        return value

    def number(self, key: str, default: float, assumed: list[str]) -> float:
        """A plain number > 0 such as 4e12."""
        if key not in self.data:
            assumed.append(key)
            return default
        try:
            value = float(self.data[key])  # YAML 1.1 reads 4e12 as text
        except (TypeError, ValueError):
            value = 0.0
        if not 0 < value < float("inf"):
            raise ConfigError(
                f"{self.place}: {key!r} must be a number above 0 such as 4e12 or 0.0007, not {self.data[key]!r}"
            )
        return value

    def _size(self, key: str) -> int:
        try:
            return parse_size(self.data[key])
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{self.place}: {key!r}: {error}") from error


def _nodes(section: _Section, path: Path) -> list[NodeFacts]:
    rates = ("disk_per_s", "flops", "memory_per_s", "layer_overhead_s")
    section.only("name", "count", "cores", "memory", "memory_source", *rates, "devices")
    assumed: list[str] = []
    if "cores" not in section.data:
        raise ConfigError(f"{section.place}: 'cores' is missing: the number of CPU cores")
    cores, count, name = section.count("cores", 1), section.count("count", 1), section.text("name", "node")
    facts = {
        "cores": cores,
        "memory_bytes": section.size("memory"),
        "memory_source": section.text("memory_source", path.name),
        "devices": tuple(device for child in section.children("devices") for device in _devices(child, assumed)),
        "disk_bytes_per_s": section.rate("disk_per_s", ASSUMED_DISK_BYTES_PER_S, assumed),
        "flops": section.number("flops", ASSUMED_CORE_FLOPS * cores, assumed),
        "memory_bytes_per_s": section.rate("memory_per_s", ASSUMED_MEMORY_BYTES_PER_S, assumed),
        "layer_overhead_s": section.number("layer_overhead_s", 0.0, []) if "layer_overhead_s" in section.data else None,
    }
    names = [name] if count == 1 else [f"{name}-{i}" for i in range(count)]
    return [NodeFacts(name=each, assumed=tuple(assumed), **facts) for each in names]  # type: ignore[arg-type]


def _devices(section: _Section, assumed: list[str]) -> list[DeviceFacts]:
    section.only("name", "count", "memory", "link_per_s", "flops", "memory_per_s")
    missing: list[str] = []
    device = DeviceFacts(
        name=section.text("name", "gpu"),
        memory_bytes=section.size("memory"),
        link_bytes_per_s=section.rate("link_per_s", ASSUMED_LINK_BYTES_PER_S, missing),
        flops=section.number("flops", ASSUMED_DEVICE_FLOPS, missing),
        memory_bytes_per_s=section.rate("memory_per_s", ASSUMED_DEVICE_BYTES_PER_S, missing),
    )
    assumed += [f"{device.name} {key}" for key in missing]
    return [device] * section.count("count", 1)
