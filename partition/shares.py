"""How much of a model each stage should get where nodes differ: so much that all stages take equally long.

streamed    a stage with memory M and disk rate R takes (S - M) / R for S bytes: S = M + R·t, the same t for all
resident    S in proportion to the rate at which memory is read, no stage more than its memory holds
"""

from __future__ import annotations

from collections.abc import Sequence

from partition.work import Work

_ALIKE = 1.25  # nodes whose figures differ by less get the same: measured ones never agree, and a cut should stay
_FOR_WEIGHTS = 0.8  # of a node's memory; the rest is for KV and activations, which are settled later
_ROUNDS = 60


def stage_shares(work: Work) -> tuple[float, ...] | None:
    """Bytes of each stage, as a wish: what is cut has whole layers. None: the nodes are alike, cut evenly."""
    memory, disk, rate = zip(*(_figures(work, number) for number in range(len(work.stages))), strict=True)
    if all(_alike(figures) for figures in (memory, disk, rate)):
        return None
    total = float(sum(sum(sizes) for stage in work.stages for sizes in stage.sizes))
    if total > sum(memory):
        t = (total - sum(memory)) / sum(disk)
        return tuple(own + per_s * t for own, per_s in zip(memory, disk, strict=True))
    return _level(memory, rate, total)


def _figures(work: Work, number: int) -> tuple[float, float, float]:
    """(bytes it may keep, bytes/s that come from below that, bytes/s at which they are computed with) of a stage."""
    stage, tensor = work.stages[number], work.options.tensor
    node = work.hardware.nodes[stage.node]
    sharing = sum(other.node == stage.node for other in work.stages)
    if work.options.device == "cuda":
        device = min(node.devices, key=lambda each: each.memory_bytes)
        memory = min(device.memory_bytes, work.options.device_memory or device.memory_bytes)
        return _FOR_WEIGHTS * memory * tensor, device.link_bytes_per_s * tensor, device.memory_bytes_per_s * tensor
    return (
        _FOR_WEIGHTS * work.limits[stage.node].limit_bytes / sharing,
        node.disk_bytes_per_s / sharing,
        node.memory_bytes_per_s / sharing,
    )


def _alike(figures: Sequence[float]) -> bool:
    return max(figures) < _ALIKE * min(figures)


def _level(memory: Sequence[float], rate: Sequence[float], total: float) -> tuple[float, ...]:
    """Bytes in proportion to `rate` up to `memory`, `total` together: what is too much for one goes to the others."""
    low, high = 0.0, total / min(rate)
    for _ in range(_ROUNDS):
        seconds = (low + high) / 2
        held = sum(min(own, per_s * seconds) for own, per_s in zip(memory, rate, strict=True))
        low, high = (low, seconds) if held >= total else (seconds, high)
    return tuple(min(own, per_s * high) for own, per_s in zip(memory, rate, strict=True))
