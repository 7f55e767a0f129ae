"""asked_run.py in a host, and what it answers."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from namespaces.hosts import Host

_SCRIPT = Path(__file__).resolve().parent / "asked_run.py"
_TESTS = _SCRIPT.parent.parent
ANSWER_S = 120.0


class Asked:
    """`with Asked(host, run_file, environment) as run:`; it is ready then."""

    def __init__(self, host: Host, file: Path, environment: Mapping[str, str]) -> None:
        self._log = host.own / "asked.log"
        command, pipe = [sys.executable, _SCRIPT, file], subprocess.PIPE
        own = {**environment, "PYTHONPATH": f"{environment['PYTHONPATH']}:{_TESTS}"}
        with self._log.open("w") as log:
            self._process = host.popen(command, own, stdin=pipe, stdout=pipe, stderr=log)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Asked:
        try:
            self.expect("ready")
        except BaseException:
            self._process.kill()
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.end(30)
        finally:
            self._process.kill()
            self._reader.join(10)
            if self._process.stdout is not None:
                self._process.stdout.close()

    def expect(self, key: str, timeout_s: float = ANSWER_S) -> Any:
        """That answer, which must be the next."""
        answer = self._next(key, timeout_s)
        assert key in answer, f"{answer}\n{self.errors()}"
        return answer[key]

    def _next(self, key: str, timeout_s: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(1)  # it writes where its threads are
            raise AssertionError(f"no {key!r} within {timeout_s} s:\n{self.errors()}") from None
        assert answer is not None, f"it ended with {self._process.wait(10)}:\n{self.errors()}"
        return answer

    def begin_crowd(self) -> None:
        """Its requests are under way; `expect` their tokens."""
        self._tell("crowd")
        self.expect("begun")

    def end_of_crowd(self) -> tuple[list[list[int]], list[str]]:
        """Its tokens, or its errors if one failed."""
        answer = self._next("tokens", ANSWER_S)
        return answer.get("tokens", []), answer.get("errors", [])

    def tokens(self) -> list[list[int]]:
        """Of one more crowd."""
        self.begin_crowd()
        found: list[list[int]] = self.expect("tokens")
        return found

    def state(self) -> dict[str, Any]:
        """While no crowd is under way."""
        self._tell("state")
        found: dict[str, Any] = self.expect("gang")
        return found

    def wait_for_state(self, name: str, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while (found := self.state())["state"] != name:
            assert time.monotonic() < until, f"{found} within {timeout_s} s"
            time.sleep(0.5)

    def refusal(self) -> str:
        """Why it takes no requests."""
        self._tell("crowd")
        words: str = self.expect("refused")
        return words

    def end(self, timeout_s: float) -> int:
        """Its exit code when it is asked to end."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        return self._process.wait(timeout_s)

    def errors(self) -> str:
        return self._log.read_text()

    def _tell(self, line: str) -> None:
        if self._process.stdin is None:
            raise RuntimeError("it has no standard input")
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                self._answers.put(json.loads(line) if line.startswith("{") else {"noise": line})
        self._answers.put(None)
