"""The table of supported model families, read from families.json (made by scripts/generate_families.py)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from partition.errors import UnsupportedModelError


@cache
def family_table() -> dict[str, dict[str, Any]]:
    """model_type -> its entry; see scripts/generate_families.py for the fields."""
    table: dict[str, dict[str, Any]] = json.loads(resources.files("partition").joinpath("families.json").read_text())
    return table


def family_of(model_type: str) -> Mapping[str, Any]:
    """The entry of a family. Raises UnsupportedModelError naming the supported ones."""
    table = family_table()
    if model_type not in table:
        near = difflib.get_close_matches(model_type, table, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported{hint}; supported families: {', '.join(sorted(table))}"
        )
    return table[model_type]
