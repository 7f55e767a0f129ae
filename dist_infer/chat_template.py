"""Chat templates rendered in a process of their own, which is killed when one takes too long.

LLM.chat ──> TemplateRenderer.render ──JSON line──> dist_infer.template_process (sandbox, memory limit)
                    │  <──JSON line───────────────         │
                    └── deadline: kill ────────────────────┘   the next request starts a new one
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from dist_infer.chat_messages import Conversation
from partition.errors import ClusterError, ConfigError

_START_TIMEOUT_S = 60.0  # 0.3 s on an idle machine with a warm page cache
_TURN_TIMEOUT_S = 60.0  # for other threads' requests before this one
_CHUNK_BYTES = 1 << 16
_CLOSED = "the engine is closed and renders no chat template"
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ")


@dataclass(frozen=True, kw_only=True)
class RenderLimits:
    """What one rendering may take.

    timeout_s: of wall time. max_memory_bytes: beyond what the process has when it is ready.
    max_input_bytes: template, messages, tools and documents as JSON. max_text_bytes: of the result, in UTF-8.
    """

    timeout_s: float = 5.0
    max_memory_bytes: int = 512 << 20
    max_input_bytes: int = 8 << 20
    max_text_bytes: int = 4 << 20  # a million tokens


@dataclass(kw_only=True)
class _Child:
    process: subprocess.Popen[bytes]
    request_fd: int
    answer_fd: int
    unread: bytearray = field(default_factory=bytearray)


class _TimedOutError(Exception):
    """The deadline has passed."""


class _EndedError(Exception):
    """The process has closed its end."""


class TemplateRenderer:
    """Owns at most one process, started at the first rendering. A context manager; `close` leaves none behind.

    Any thread may call; renderings come one after the other.
    """

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self._limits = limits or RenderLimits()
        self._turn = threading.Lock()
        self._child: _Child | None = None
        self._closed = False

    def render(
        self,
        template: str,
        conversation: Conversation,
        *,
        variables: Mapping[str, Any],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as the template writes it: what transformers' apply_chat_template(tokenize=False) gives.

        variables: what the template sees by name beside messages, tools and documents: the special tokens.
        ConfigError: the template refuses the messages, fails, or goes beyond a limit. ClusterError: the process cannot
        be started, or this renderer is closed.
        """
        request = {
            "template": template,
            "messages": conversation.messages,
            "tools": conversation.tools,
            "documents": conversation.documents,
            "variables": dict(variables),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        line = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        if len(line) > self._limits.max_input_bytes:
            raise ConfigError(
                f"messages, tools, documents and chat template are {len(line)} bytes together, more than the "
                f"{self._limits.max_input_bytes} that one conversation may have: shorten them"
            )
        if not self._turn.acquire(timeout=_TURN_TIMEOUT_S):
            raise ClusterError(f"no turn to render a chat template within {_TURN_TIMEOUT_S:g} s: others take too long")
        try:
            return self._result(self._ask(line))
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the process, and with it a rendering that is under way in another thread. Idempotent."""
        self._closed = True
        if (child := self._child) is not None:
            child.process.kill()
        with self._turn:  # soon: whoever has it or waits for it sees the above
            self._end_child()

    def __enter__(self) -> TemplateRenderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, line: bytes) -> dict[str, Any]:
        if self._closed:
            raise ClusterError(_CLOSED)
        if self._child is not None and self._child.process.poll() is not None:
            self._end_child()  # somebody killed it while it was idle
        child = self._child or self._start()
        try:
            return _exchange(child, line, time.monotonic() + self._limits.timeout_s, self._max_answer_bytes())
        except _TimedOutError:
            self._end_child()
            return {"error": "time"}
        except _EndedError:
            self._end_child()
            return {"error": "time" if child.process.returncode == -signal.SIGALRM else "ended"}
        except BaseException:  # Ctrl-C, for one: what it answers later must not be taken for another's answer
            self._end_child()
            raise

    def _result(self, answer: dict[str, Any]) -> str:
        limits = self._limits
        match answer.get("error"):
            case None:
                return str(answer["text"])
            case "refused":
                raise ConfigError(f"the model's chat template refuses these messages: {answer['message']}")
            case "failed":
                raise ConfigError(f"the model's chat template fails on these messages ({answer['message']})")
            case "time":
                why = f"took longer than {limits.timeout_s:g} s and was ended"
            case "size":
                why = f"gives {answer['message']} bytes of text, more than the {limits.max_text_bytes} it may"
            case "memory":
                self._end_child()  # its heap is full of what it has tried
                why = f"took more than the {limits.max_memory_bytes >> 20} MiB of memory it may"
            case _ if self._closed:
                raise ClusterError(_CLOSED)
            case _:
                why = "ended the process that renders it"
        raise ConfigError(
            f"the model's chat template {why}: give fewer or shorter messages, or another template (chat_template=)"
        )

    def _max_answer_bytes(self) -> int:
        return 6 * self._limits.max_text_bytes + (1 << 16)  # JSON writes a control character with six

    def _start(self) -> _Child:
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OPENBLAS_NUM_THREADS": "1"}
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dist_infer.template_process", json.dumps(asdict(self._limits))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                process_group=0,  # Ctrl-C goes to a whole group; the owner decides
            )
        except OSError as error:
            raise ClusterError(f"cannot start the process that renders chat templates: {error}") from error
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise RuntimeError("a process without the pipes it was given")
        child = _Child(process=process, request_fd=process.stdin.fileno(), answer_fd=process.stdout.fileno())
        self._child = child
        try:
            os.set_blocking(child.request_fd, False)
            os.set_blocking(child.answer_fd, False)
            _exchange(child, b"", time.monotonic() + _START_TIMEOUT_S, _CHUNK_BYTES)
        except (_TimedOutError, _EndedError) as error:
            process.kill()
            said = process.stderr.read().decode(errors="replace").strip()
            self._end_child()
            if self._closed:
                raise ClusterError(_CLOSED) from error
            late = f"did not start within {_START_TIMEOUT_S:g} s"
            raise ClusterError(
                f"the process that renders chat templates {late if isinstance(error, _TimedOutError) else 'ended'}: "
                f"{said[-1000:] or 'it said nothing'}"
            ) from error
        except BaseException:
            self._end_child()
            raise
        process.stderr.close()
        if self._closed:
            raise ClusterError(_CLOSED)  # `close` waits for its turn to end the process
        return child

    def _end_child(self) -> None:
        """It holds nothing that a kill could damage."""
        child, self._child = self._child, None
        if child is None:
            return
        child.process.kill()
        child.process.wait()
        for stream in (child.process.stdin, child.process.stdout, child.process.stderr):
            if stream is not None:
                stream.close()


def _exchange(child: _Child, line: bytes, deadline_s: float, max_answer_bytes: int) -> dict[str, Any]:
    """Send `line` and wait for a line that answers it; neither side can make the other wait beyond the deadline."""
    unsent, unread = memoryview(line), child.unread
    poll = select.poll()
    poll.register(child.answer_fd, select.POLLIN)
    if unsent:
        poll.register(child.request_fd, select.POLLOUT)
    while (end := unread.find(b"\n")) < 0:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise _TimedOutError
        for fd, _ in poll.poll(math.ceil(left_s * 1000)):
            try:
                if fd == child.request_fd:
                    unsent = unsent[os.write(fd, unsent[:_CHUNK_BYTES]) :]
                    if not unsent:
                        poll.unregister(fd)
                elif chunk := os.read(fd, _CHUNK_BYTES):
                    unread += chunk
                else:
                    raise _EndedError
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise _EndedError from None
        if len(unread) > max_answer_bytes:
            raise _EndedError
    answer: dict[str, Any] = json.loads(unread[:end].decode("utf-8", "surrogatepass"))
    del unread[: end + 1]
    return answer
