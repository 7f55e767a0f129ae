"""What every runner has in common: its job, its marks, and the one JSON line at the end. Standard library only, because
each runner lives in its peer's own environment.

A runner is called as `python RUNNER JOB.json`. Times count from the start of its process, imports included:

    start ──────────── loaded ──────────── first ──────────── end
           load               prefill             decode
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Job:
    """model: the safetensors folder or GGUF file. scratch: an empty folder for what the peer writes. memory_bytes: of
    the group, None without one. setting: the peer's own choice, e.g. an encoding. The prompts are token ids.
    """

    model: str
    scratch: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    vocab: int
    threads: int
    memory_bytes: int | None
    setting: str

    def prompts(self) -> list[list[int]]:
        """Different for each sequence, the same for every peer; above the ids with a meaning."""
        low, span = 3, self.vocab - 3
        return [
            [
                low + (7919 * (sequence * self.prompt_tokens + position) + 101) % span
                for position in range(self.prompt_tokens)
            ]
            for sequence in range(self.batch)
        ]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One moment: seconds since the process began, its processor seconds, bytes it had read from block devices, and the
    tokens all sequences had together."""

    seconds: float
    cpu_s: float
    read_bytes: int
    num_tokens: int


class Recorder:
    """Takes the marks of one run. Owned by the runner."""

    def __init__(self) -> None:
        self.job = Job(**json.loads(Path(sys.argv[1]).read_text()))
        self._began = _process_start()
        self._loaded: Mark | None = None
        self._steps: list[Mark] = []

    def loaded(self) -> None:
        """Ready for the first prompt."""
        self._loaded = self._mark(0)

    def tokens(self, num_tokens: int) -> None:
        """All sequences together have so many new tokens now. The first call: every sequence has its first one."""
        self._steps.append(self._mark(num_tokens))

    def finish(self, token_ids: Sequence[Sequence[int]], packages: Sequence[str], settings: dict[str, object]) -> None:
        """Print the result; token_ids: the new ones, by sequence."""
        if self._loaded is None or len(self._steps) < 2:
            raise RuntimeError("a run has `loaded` and at least two `tokens`")
        document = {
            "loaded": asdict(self._loaded),
            "steps": [asdict(step) for step in self._steps],
            "token_ids": [[int(token) for token in sequence] for sequence in token_ids],
            "max_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "versions": {package: version(package) for package in packages},
            "settings": settings,
        }
        print(json.dumps(document), flush=True)

    def _mark(self, num_tokens: int) -> Mark:
        return Mark(
            seconds=time.clock_gettime(time.CLOCK_BOOTTIME) - self._began,
            cpu_s=time.process_time(),
            read_bytes=_read_bytes(),
            num_tokens=num_tokens,
        )


def _process_start() -> float:
    """Of this process, in seconds since the machine's start."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _read_bytes() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")
