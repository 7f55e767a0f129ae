"""Checked reading of config.json: numbers and flags, with the family's own defaults for what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from partition.errors import ConfigError

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")  # one number, three names among families


@dataclass(frozen=True)
class ConfigKeys:
    """`config`: the language model's part. `defaults`: what an absent key means, as the family's config class has it.

    Every reader raises ConfigError for a value that makes no sense.
    """

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    model_type: str

    def get(self, key: str) -> Any:
        """As it stands there, null included; else the default, or None."""
        return self.config[key] if key in self.config else self.defaults.get(key)

    def count(self, key: str, *, absent: int | None = None, least: int = 1) -> int:
        """An integer ≥ least; `absent` is what a missing or null key means."""
        value = self.get(key)
        if value is None:
            value = absent
        if value is None:
            raise ConfigError(f"config.json of a {self.model_type} model has no {key!r}")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**40:
            raise ConfigError(f"config.json: {key!r} is {value!r}, but must be a whole number of at least {least}")
        return value

    def flag(self, key: str, otherwise: Any = None) -> bool:
        """A boolean; `otherwise` is what a missing or null key means, before the default."""
        value = self.config.get(key)
        value = otherwise if value is None else value
        value = self.defaults.get(key) if value is None else value
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"config.json: {key!r} is {value!r}, but must be true or false")
        return bool(value)

    def experts(self) -> int:
        """The number of routed experts, under whichever name."""
        for key in _EXPERT_KEYS:
            if self.get(key) is not None:
                return self.count(key)
        raise ConfigError(f"config.json of a {self.model_type} model has none of {', '.join(_EXPERT_KEYS)}")
