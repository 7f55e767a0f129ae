"""What goes wrong over HTTP: a status and OpenAI's error body, never a trace, a path or a key.

400 invalid_request_error (bad JSON too)   401 no key   403 a key for /metrics alone   404 unknown model or route
405   408   413   415
429 queue or rate, with Retry-After   500 ours   503 loading, draining, failed, with Retry-After   504 deadline
"""

from __future__ import annotations

import json
import math
import re

from dist_infer.openai.tools.errors import FieldError
from partition.errors import ClusterError, ConfigError

_CONTEXT = re.compile(r"max_model_len is|KV blocks of")
_MAX_MESSAGE_CHARS = 1500
_MAX_PARAM_CHARS = 200
_FIELD = re.compile(r"`?([a-z][a-z_]*)")


class ApiError(Exception):
    """Ends one HTTP request. param: the field of the request it is about. retry_after_s: when trying again may help."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    def body(self) -> bytes:
        """{"error": {message, type, param, code}}"""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unauthorized(message: str) -> ApiError:
    return ApiError(401, message, type="authentication_error", code="invalid_api_key")


def forbidden(message: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code="key_not_allowed")


def not_found(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(404, message, param=param, code=code)


def too_many(message: str, code: str, retry_after_s: float) -> ApiError:
    return ApiError(429, message, type="rate_limit_error", code=code, retry_after_s=retry_after_s)


def unavailable(message: str, code: str, retry_after_s: float) -> ApiError:
    return ApiError(503, message, type="service_unavailable_error", code=code, retry_after_s=retry_after_s)


def deadline_passed(message: str) -> ApiError:
    return ApiError(504, message, type="timeout_error", code="deadline_exceeded")


def internal(request_id: str) -> ApiError:
    """What was raised is in the server's log under this id, and nowhere else."""
    message = f"an internal error ended this request; the server's log has it under {request_id}"
    return ApiError(500, message, type="internal_error", code="internal_error")


def translated(error: Exception, fields: frozenset[str] = frozenset()) -> ApiError | None:
    """An error of the engine or of a check as one of HTTP; None for a bug. fields: names that a message may begin with.

    The message of a ConfigError is meant for who wrote the request; that of a ClusterError is not.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FieldError):
        return bad_request(_short(str(error), _MAX_MESSAGE_CHARS), param=_short(error.param, _MAX_PARAM_CHARS))
    if isinstance(error, ConfigError):
        message = _short(str(error), _MAX_MESSAGE_CHARS)
        named = _FIELD.match(message)
        param = named[1] if named is not None and named[1] in fields else None
        code = "context_length_exceeded" if _CONTEXT.search(message) else None
        return bad_request(message, param=param, code=code)
    if isinstance(error, ClusterError):
        return unavailable("the engine has failed and is being replaced", "engine_unavailable", 10)
    return None


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
