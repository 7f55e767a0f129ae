"""Sizes as people write them: `512 MiB`, `1.5 GB`, `0`."""

from __future__ import annotations

import re

from partition.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_LARGEST = 2**60
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `512 MiB`; a bare number is bytes. Raises ConfigError for anything else."""
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ConfigError(f"a size is a number with a unit such as '512 MiB', not {text!r}")
    if isinstance(text, int):
        if text < 0:
            raise ConfigError(f"a size cannot be negative: {text}")
        return _possible(text, text)
    found = _SIZE.match(text)
    if found is None or found[2].lower() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size: write a number and a unit, e.g. '512 MiB', '1.5 GiB', '2 GB'")
    return _possible(float(found[1]) * _UNITS[found[2].lower()], text)


def _possible(num_bytes: float, text: str | int) -> int:
    if num_bytes > _LARGEST:
        raise ConfigError(f"{str(text)[:40]!r} is more than any memory or disk holds")
    return int(num_bytes)


def format_size(num_bytes: float) -> str:
    """`1.50 GiB` for people; exact below 1 KiB."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
