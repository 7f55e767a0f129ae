"""The nodes of a Ray cluster, asked from a process of our own: Ray gives no deadline for connecting, a kill does.

The process writes a line when it has connected, one when the nodes have looked, one when they have met each other. What
it has written when its time is up counts. The launch that follows connects as if nothing had been.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass

from pydantic import ValidationError

from dist_infer.config import RunConfig
from dist_infer.messages import decode
from launch.doctor.meeting import Connected, Looks, Met

_START = "import sys; sys.argv[0] = sys.argv.pop(1); from launch.doctor.meeting import main; main()"


@dataclass(frozen=True, kw_only=True)
class ClusterLook:
    """None: it did not come so far, and `problem` says why."""

    connected: Connected | None
    looks: Looks | None
    met: Met | None
    problem: str


class ClusterProcess:
    """Started by the constructor; `result` waits, `close` kills. Ctrl-C reaches it as it reaches its parent."""

    def __init__(self, config: RunConfig) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        request = config.model_copy(update={"run": None}).model_dump_json().encode()
        self._process = subprocess.Popen(
            # the program's own name: Ray puts its directory on the path of workers, as it will for the launch
            [sys.executable, "-P", "-c", _START, sys.argv[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        if (stdin := self._process.stdin) is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
                stdin.write(request)
                stdin.close()
            self._process.stdin = None  # `communicate` would write again

    def result(self, timeout_s: float) -> ClusterLook:
        """What it found, or what it had found until the deadline."""
        late = False
        try:
            out, said = self._process.communicate(timeout=max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            late = True
            self._process.kill()
            out, said = self._process.communicate()
        return _read(out, said.decode(errors="replace"), late=late)

    def close(self) -> None:
        """Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def _read(out: bytes, said: str, *, late: bool) -> ClusterLook:
    lines = [line for line in out.split(b"\n") if line]
    try:
        connected = decode(Connected, lines[0]) if lines else None
        looks = decode(Looks, lines[1]) if len(lines) > 1 else None
        met = decode(Met, lines[2]) if len(lines) > 2 else None
    except ValidationError as error:  # half a line
        return ClusterLook(connected=None, looks=None, met=None, problem=f"its answer was cut off: {error}")
    words = [line.strip() for line in said.splitlines() if line.strip()]
    problem = ""
    if met is None:
        stage = "connecting" if connected is None else "looking at the nodes" if looks is None else "the network"
        problem = f"{stage} took too long" if late else (words[-1] if words else f"{stage} ended without a word")
    return ClusterLook(connected=connected, looks=looks, met=met, problem=problem)
