"""The four packages have generic names: make sure that all of them are ours, from one place."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("partition", "offload", "dist_infer", "launch")


def check_one_root() -> None:
    """Raise ConfigError naming the intruder unless all four packages are found beside this one."""
    if (intruder := find_intruder()) is not None:
        from partition.errors import ConfigError  # if it is ours

        raise ConfigError(intruder)


def find_intruder() -> str | None:
    """What is wrong in words, None if nothing is. Imports nothing of ours, since that could be the intruder's."""
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        origin = Path(found.origin).resolve() if found is not None and found.origin is not None else None
        if origin is None or origin.parent.parent != root:
            return (
                f"the package {name!r} is found at {origin}, not beside dist-infer in {root}: another project's "
                "package of that name comes first on the import path (current directory, PYTHONPATH); rename it"
            )
    return None
