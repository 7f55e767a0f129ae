"""A check in a process of its own: `python -m dist_infer.check_arch.child FD < task`, the report back on FD.

A crash, a hang or a model that eats the memory so ends one check and not the walk.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from pydantic import TypeAdapter

from dist_infer.check_arch.layout import Layout

_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One check. `work`: an empty directory of its own. `memory_bytes`: what the process may allocate.

    `deadline_s`: the owner ends the check then; a little later it ends itself, if the owner is gone.
    """

    target: str
    layouts: tuple[Layout, ...]
    work: str
    memory_bytes: int
    deadline_s: float


tasks: TypeAdapter[Task] = TypeAdapter(Task)


def main() -> None:
    task = tasks.validate_json(sys.stdin.buffer.read())
    signal.setitimer(signal.ITIMER_REAL, task.deadline_s + _GRACE_S)
    resource.setrlimit(resource.RLIMIT_DATA, (task.memory_bytes, task.memory_bytes))
    from dist_infer.check_arch.check import check  # imports torch, which the limit is to hold for
    from dist_infer.check_arch.report import to_json

    warnings.simplefilter("ignore")  # model classes warn of what a tiny model is not
    report = check(task.target, task.layouts, Path(task.work))
    connection = Connection(int(sys.argv[1]), readable=False)
    connection.send_bytes(to_json(report))
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # model classes and their libraries may leave threads that do not end


if __name__ == "__main__":
    main()
