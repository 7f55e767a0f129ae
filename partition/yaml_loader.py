"""How YAML written by people is read: safely, and a key written twice is an error, where YAML keeps the last."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from partition.errors import ConfigError


def parse_yaml(text: str) -> Any:
    """The document as plain values. Raises ConfigError, without a place, for anything that cannot be read."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except (
        yaml.YAMLError,
        ValueError,
        AttributeError,
    ) as error:  # not all its own: 2020-13-45 is no date, 0x_ no number
        raise ConfigError(f"not YAML: {error}") from None
    except RecursionError:
        raise ConfigError("not YAML: nested too deeply") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is there twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)
