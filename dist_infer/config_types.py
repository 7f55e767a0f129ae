"""What values of the run file may look like: sizes, times, counts, `auto`; and the base of its sections.

A JSON schema of these tells editors what people may write, not what the fields keep.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from partition.errors import ConfigError
from partition.sizes import parse_size

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|min|h|)\s*$")
_MAX_SECONDS = 1e6  # poll() of the system counts milliseconds in 31 bits
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}

_AUTO: dict[str, Any] = {"const": "auto", "type": "string"}
_SIZES: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 0},
    {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([KMGTkmgt]?i?[Bb])?\s*$"},
]
_TIMES: list[dict[str, Any]] = [
    {"type": "number", "exclusiveMinimum": 0, "maximum": _MAX_SECONDS},
    {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*(ms|s|min|h)?\s*$"},
]
_SIZE_FORMAT, _TIME_FORMAT = "size, e.g. '512 MiB'", "time, e.g. '30 s'"


def _size(value: Any) -> Any:
    return value if value == "auto" else parse_size(value)


def _duration(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        found = _DURATION.match(value)
        if found is None:
            raise ConfigError(f"{value!r} is not a time: write e.g. '30 s', '2 min'")
        return float(found[1]) * _SECONDS[found[2]]
    return value


Auto = Literal["auto"]
AutoSize = Annotated[
    int | Auto, BeforeValidator(_size), WithJsonSchema({"anyOf": [*_SIZES, _AUTO], "format": _SIZE_FORMAT})
]
_Positive = Annotated[float, Field(gt=0, le=_MAX_SECONDS)]
Seconds = Annotated[_Positive, BeforeValidator(_duration), WithJsonSchema({"anyOf": _TIMES, "format": _TIME_FORMAT})]
AutoSeconds = Annotated[
    _Positive | Auto, BeforeValidator(_duration), WithJsonSchema({"anyOf": [*_TIMES, _AUTO], "format": _TIME_FORMAT})
]
Count = Annotated[int, Field(ge=1)]
ReaderKind = Literal["auto", "threads", "aio", "deepspeed"]
AutoCount = Annotated[int, Field(ge=1)] | Auto


def _token_ids(value: Any) -> Any:
    """Keys that were written as numbers are numbers again, if they went through JSON."""
    if not isinstance(value, Mapping):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: bias for key, bias in value.items()}


LogitBias = Annotated[dict[int, float], BeforeValidator(_token_ids)]


class Section(BaseModel):
    """A part of the run file: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
