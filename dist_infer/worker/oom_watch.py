"""Whether a rank died because memory ran out: the kernel says so in counters, never to the one who asks why."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from offload.machine import oom_kills


class OomWatch:
    """Remembers the kernel's counts of when it was made; any thread may ask."""

    def __init__(self, counts: Callable[[], Mapping[str, int]] = oom_kills) -> None:
        self._counts = counts
        self._before = dict(counts())

    def explain(self) -> str:
        """The end of an error message, saying whose memory ran out; empty while the kernel has killed nothing since.

        The innermost memory cgroup counts most. Kills anywhere else on the machine are only a hint, in containers one
        about somebody else.
        """
        for where, count in self._counts().items():
            if count > self._before.get(where, count):
                certain = "out of memory" if where.startswith("cgroup") else "probably out of memory"
                return (
                    f". It is {certain}: the kernel's OOM killer has struck in {where} since the start. "
                    "Lower offload.host_memory or engine.kv_memory, or give the run more memory"
                )
        return ""
