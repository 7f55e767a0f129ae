"""What Ray reads in the environment about a raylet, its own part on a node, and about those that a raylet starts."""

from __future__ import annotations

# Ray ends at once whoever finds the raylet's socket closed and its own parent gone, taking the raylet for that parent
# unless this variable names another process. A detached run has no parent, and has to say what is lost and to start it
# again: it names itself. Read when Ray is imported. What a raylet starts has the raylet's pid there.
RAYLET = "RAY_RAYLET_PID"
# Ray's agents give themselves a title, by default where their environment was. With this the mark can be read there
# (`launch.runs.reap`), of agents too that outlive their raylet by a minute, trying to tell a head that is gone as well.
KEEP_ENVIRONMENT = "SPT_NOENV"
