"""The endpoint's own log lines: one JSON object each, with the id of the request they belong to.

What a client wrote or was answered gets into a log only with run.log_prompts. Texts of errors that are not of our tree
may quote it, so without that key such an error is logged as its kind and its stack.
"""

from __future__ import annotations

import json
import logging
import traceback
from contextvars import ContextVar
from pathlib import Path

from partition.errors import ConfigError, DistInferError

ACCESS_LOG = logging.getLogger("dist_infer.access")
PROMPT_LOG = logging.getLogger("dist_infer.prompts")
_READY_MADE = frozenset({ACCESS_LOG.name, PROMPT_LOG.name})  # whose messages are lines already
_OURS = ("dist_infer", "offload", "partition", "launch", "uvicorn.error", "asyncio", "opentelemetry")
_REQUEST_ID: ContextVar[str] = ContextVar("dist_infer_request_id", default="")
_log = logging.getLogger("dist_infer.requests")


def enter_request(request_id: str) -> None:
    """From here on, in this task and those it starts, log lines carry this id."""
    _REQUEST_ID.set(request_id)


def request_id_of() -> str:
    """Of the request whose task this is; empty elsewhere."""
    return _REQUEST_ID.get()


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "request_id", "message"}; "error" where there is one. with_text: see `described`."""

    def __init__(self, *, with_text: bool) -> None:
        super().__init__()
        self._with_text = with_text

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.name in _READY_MADE:
            return message
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id_of(),
            "message": message,
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = described(record.exc_info[1], with_text=self._with_text)
        return json.dumps(line)


class LogFiles:
    """The files of run.access_log and run.log_file. Opens them; `close` takes them away again."""

    def __init__(self, *, access_log: str | None, log_file: str | None, log_prompts: bool) -> None:
        """Raises ConfigError for a file that cannot be written."""
        self._handlers: list[tuple[logging.Logger, logging.Handler]] = []
        self._propagated = ACCESS_LOG.propagate
        if access_log is not None and not _is_same(access_log, log_file):
            self._add(ACCESS_LOG, _opened("run.access_log", access_log, with_text=False))
            ACCESS_LOG.propagate = False
        if log_file is not None:
            try:
                handler = _opened("run.log_file", log_file, with_text=log_prompts)
            except ConfigError:
                self.close()
                raise
            for name in _OURS:
                self._add(logging.getLogger(name), handler)
            PROMPT_LOG.setLevel(logging.INFO)
        if self._handlers:
            ACCESS_LOG.setLevel(logging.INFO)

    def close(self) -> None:
        for logger, handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._handlers = []
        ACCESS_LOG.propagate = self._propagated

    def _add(self, logger: logging.Logger, handler: logging.Handler) -> None:
        logger.addHandler(handler)
        self._handlers.append((logger, handler))


def log_failure(request_id: str, error: BaseException, *, with_text: bool) -> None:
    """An error that nobody foresaw, under the request's id."""
    _log.error("request %s failed: %s", request_id, described(error, with_text=with_text))


def described(error: BaseException, *, with_text: bool) -> str:
    """Kind and stack of an error and of what it came from. with_text: the words of all, not of our own errors alone."""
    parts: list[str] = []
    found: BaseException | None = error
    while found is not None and len(parts) < 8:
        is_plain = isinstance(found, DistInferError) and not isinstance(found, ConfigError)  # those quote what was sent
        words = f": {found}" if with_text or is_plain else ""
        stack = "".join(traceback.format_tb(found.__traceback__))
        parts.append(f"{stack}{type(found).__qualname__}{words}")
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return "\nfrom\n".join(parts)


def _opened(key: str, file: str, *, with_text: bool) -> logging.Handler:
    try:
        handler = logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: cannot write {file}: {error.strerror}") from error
    handler.setFormatter(JsonLines(with_text=with_text))
    return handler


def _is_same(one: str, other: str | None) -> bool:
    return other is not None and Path(one).resolve() == Path(other).resolve()
