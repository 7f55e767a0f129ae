"""The error of one field of a request."""

from __future__ import annotations

from partition.errors import ConfigError


class FieldError(ConfigError):
    """A field cannot be used as it is. `param` is its place in the request, e.g. `tools[0].function.name`."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param} {message}")
        self.param = param
