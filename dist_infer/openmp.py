"""OpenMP's thread pools, of which torch makes one for each thread that computes.

libgomp counts the threads of all pools of the process. While there are more than cores, a thread that waits for the
next parallel region sleeps at once in place of spinning, and each of the thousand regions of a pass pays for waking it:
on two cores a small linear, exp and softmax took 418 us instead of 113 as soon as another thread had ever computed
something in parallel. So a thread that has prepared a model gives its pool back before another one computes with it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_SOFT = 1  # omp_pause_soft: what was set, such as the number of threads, stays


def release_pool() -> bool:
    """End the calling thread's pool; its next parallel region makes a new one. False: no libgomp is loaded."""
    loaded = {line.split(maxsplit=5)[5] for line in _MAPS.read_text(encoding="utf-8").splitlines() if "libgomp" in line}
    for path in loaded:
        ctypes.CDLL(path).omp_pause_resource_all(_SOFT)
    return bool(loaded)
