"""The mark of a run: a random id that its processes carry in their environment, and its parts in Ray in their names.

By it, and never by a name that somebody else may have chosen too, what a killed run left is told from all else.
"""

from __future__ import annotations

import os
import secrets

MARK = "DIST_INFER_RUN"  # the environment variable
REPLICA = "replica"
_SHOWN = 8  # characters of the id in a label


def new_run_id() -> str:
    return secrets.token_hex(16)


def current_run_id() -> str:
    """Of the run that this process is part of; one that nobody else has where it is part of none."""
    if not os.environ.get(MARK):
        os.environ[MARK] = new_run_id()
    return os.environ[MARK]


def run_label(name: str, run_id: str | None = None) -> str:
    """What the run's parts in Ray are called: its name and the beginning of its id (without one: this process's)."""
    return f"{name}-{(run_id or current_run_id())[:_SHOWN]}"


def first_line(label: str, who: str) -> str:
    """What a worker's output begins with. who: `rank 3`, or `replica`."""
    return f"{label}: {who}"


def is_label_of(label: str, name: str) -> bool:
    """Whether a run of that name, any run, could have this label."""
    start, _, shown = label.rpartition("-")
    return start == name and len(shown) == _SHOWN and all(c in "0123456789abcdef" for c in shown)
