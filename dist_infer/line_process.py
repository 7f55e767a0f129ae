"""A process of our own that answers a line of JSON with a line of JSON, and can be ended at any moment.

For work on what others wrote (a chat template, a grammar), which may take all time and memory. Not for several threads
at once, but for `kill`: its owner gives out the turns.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from typing import Any

from partition.errors import ClusterError

_START_TIMEOUT_S = 60.0  # 0.3 s on an idle machine with a warm page cache
_CHUNK_BYTES = 1 << 16
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ")


class LineTimeoutError(Exception):
    """The deadline has passed; the process must be ended, since its answer may still come."""


class LineEndedError(Exception):
    """The process has closed its end, or says more than it may."""


class LineProcess:
    """`python -P -m module argument`, started at once. Call `wait_until_ready` before `ask`, and `end` at the end."""

    def __init__(self, module: str, argument: str, what_it_does: str) -> None:
        """what_it_does: for messages, after "the process that". ClusterError when it cannot be started."""
        self._what = what_it_does
        self._unread = bytearray()
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OPENBLAS_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, argument],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                process_group=0,  # Ctrl-C goes to a whole group; the owner decides
            )
        except OSError as error:
            raise ClusterError(f"cannot start the process that {what_it_does}: {error}") from error
        if self._process.stdin is None or self._process.stdout is None or self._process.stderr is None:
            raise RuntimeError("a process without the pipes it was given")
        self._stderr = self._process.stderr
        self._request_fd, self._answer_fd = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._request_fd, False)
        os.set_blocking(self._answer_fd, False)

    def wait_until_ready(self) -> None:
        """Its first line. ClusterError, with what it said on standard error, when none comes."""
        try:
            self.ask(b"", _START_TIMEOUT_S, _CHUNK_BYTES)
        except (LineTimeoutError, LineEndedError) as error:
            self._process.kill()
            said = self._stderr.read().decode(errors="replace").strip()
            late = f"did not start within {_START_TIMEOUT_S:g} s"
            raise ClusterError(
                f"the process that {self._what} {late if isinstance(error, LineTimeoutError) else 'ended'}: "
                f"{said[-1000:] or 'it said nothing'}"
            ) from error
        self._stderr.close()

    def ask(self, line: bytes, timeout_s: float, max_answer_bytes: int) -> dict[str, Any]:
        """Send `line` and wait for the line that answers it; neither side makes the other wait beyond the deadline."""
        deadline_s = time.monotonic() + timeout_s
        unsent, unread = memoryview(line), self._unread
        poll = select.poll()
        poll.register(self._answer_fd, select.POLLIN)
        if unsent:
            poll.register(self._request_fd, select.POLLOUT)
        while (end := unread.find(b"\n")) < 0:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise LineTimeoutError
            for fd, _ in poll.poll(math.ceil(left_s * 1000)):
                try:
                    if fd == self._request_fd:
                        unsent = unsent[os.write(fd, unsent[:_CHUNK_BYTES]) :]
                        if not unsent:
                            poll.unregister(fd)
                    elif chunk := os.read(fd, _CHUNK_BYTES):
                        unread += chunk
                    else:
                        raise LineEndedError
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise LineEndedError from None
            if len(unread) > max_answer_bytes:
                raise LineEndedError
        answer: dict[str, Any] = json.loads(unread[:end].decode("utf-8", "surrogatepass"))
        del unread[: end + 1]
        return answer

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def signal(self) -> int | None:
        """What ended it, after `end`."""
        code = self._process.returncode
        return -code if code is not None and code < 0 else None

    def kill(self) -> None:
        """Any thread may call it, `ask` in another one then ends soon."""
        self._process.kill()

    def end(self) -> None:
        """Kill it and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()
