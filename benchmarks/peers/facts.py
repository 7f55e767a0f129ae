"""What a table is worth nothing without: the machine, the system, the revision of this repository."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


def machine_facts(work: Path) -> dict[str, Any]:
    """Processor, cores, memory, kernel, and the file system and disk of the work directory."""
    cpu = _fields(Path("/proc/cpuinfo"))
    memory = _fields(Path("/proc/meminfo"))
    flags = set(cpu.get("flags", "").split())
    device = work.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    return {
        "processor": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "vector_units": [
            name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if name in flags
        ],
        "memory_bytes": int(memory["MemTotal"].split()[0]) * 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "disk": block.resolve().name if block.exists() else "unknown",
        "disk_bytes": shutil.disk_usage(work).total,
        "load_average": os.getloadavg()[0],
    }


def revision() -> str:
    """The commit, with `, modified` where the tree has changes; `unknown` outside a repository."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
        return f"{commit}, modified" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _fields(file: Path) -> dict[str, str]:
    """`name: value` lines, the first of each name."""
    found: dict[str, str] = {}
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found
