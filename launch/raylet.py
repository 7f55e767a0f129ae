"""The end of a raylet, Ray's own part on a node: who outlives it, and who must not."""

from __future__ import annotations

import contextlib
import os

import psutil

# Ray ends at once whoever finds the raylet's socket closed and its own parent gone, taking the raylet for that parent
# unless this variable names another process. A detached run has no parent, and has to say what is lost and to start it
# again: it names itself. Read when Ray is imported. What a raylet starts has the raylet's pid there.
RAYLET = "RAY_RAYLET_PID"
# Ray's agents give themselves a title, by default where their environment was; with this it can be read by the two
# that look for them there, this module and `launch.runs.reap`.
KEEP_ENVIRONMENT = "SPT_NOENV"
_END_S = 5.0


def own_raylet() -> int | None:
    """The pid of the one that this process has started by `ray.init`, there or gone."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    started = [] if node is None else node.all_processes.get("raylet", [])
    pid: int | None = started[0].process.pid if started else None
    return pid


def end_orphans(raylet: int) -> None:
    """End what a raylet that is gone has started, and wait for it, for some seconds at most.

    Ranks end with it, but its agents try for a minute to tell a head that is gone as well.
    """
    if psutil.pid_exists(raylet):
        return
    orphans, here = [], _pid_namespace(os.getpid())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(RAYLET) == str(raylet) and _pid_namespace(process.pid) == here:
                process.kill()
                orphans.append(process)
    psutil.wait_procs(orphans, timeout=_END_S)


def _pid_namespace(pid: int) -> str:
    """Another one may have a raylet of that pid too, a container's for one."""
    return os.readlink(f"/proc/{pid}/ns/pid")
