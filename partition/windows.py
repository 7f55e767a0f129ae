"""How far back each layer's attention looks, from config.json alone.

A family that is not named here is planned as if every layer saw everything, which is never wrong, only larger. Where a
window is planned, the rank checks at run time that the model class passes no larger one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from partition.errors import ConfigError

_SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """How a family's config decides. `default`: its class default of `sliding_window`.

    `by_layer`: `layer_types` says which layers have it, else all have. Without that list every `period`-th layer sees
    everything (`sliding_window_pattern` overrides the period where `pattern_key`), or with `from_layer` layers from
    `max_window_layers` (default: `from_layer`) on have the window. `asked`: only with `use_sliding_window`.
    """

    default: int | None
    by_layer: bool = True
    period: int = 0
    pattern_key: bool = False
    from_layer: int | None = None
    asked: bool = False


RULES = {
    "mistral": WindowRule(default=4096, by_layer=False),
    "mixtral": WindowRule(default=None, by_layer=False),
    "phi3": WindowRule(default=None, by_layer=False),
    "qwen3_moe": WindowRule(default=4096, by_layer=False, asked=True),
    "qwen2": WindowRule(default=4096, from_layer=28, asked=True),
    "qwen3": WindowRule(default=4096, from_layer=28, asked=True),
    "gemma2": WindowRule(default=4096, period=2),
    "gemma3_text": WindowRule(default=4096, period=6, pattern_key=True),
    "cohere2": WindowRule(default=4096, period=4, pattern_key=True),
    "gpt_oss": WindowRule(default=128, period=2),
}


def windows_of(config: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """For each layer the number of last positions it attends to, its own included; None: all of them.

    config: the language model's part. Raises ConfigError for a senseless key.
    """
    rule = RULES.get(model_type)
    everything: tuple[int | None, ...] = (None,) * num_layers
    if rule is None or (rule.asked and not config.get("use_sliding_window")):
        return everything
    window = config.get("sliding_window", rule.default)
    if window is None:
        return everything
    window = _count("sliding_window", window)
    if config.get("use_bidirectional_attention") and model_type == "gemma3_text":
        window = window // 2 + 1  # stored as both sides together
    if not rule.by_layer:
        return (window,) * num_layers
    return tuple(window if kind == _SLIDING else None for kind in _layer_types(config, rule, num_layers))


def _layer_types(config: Mapping[str, Any], rule: WindowRule, num_layers: int) -> list[str]:
    given = config.get("layer_types")
    if given is not None:
        if not isinstance(given, list) or len(given) < num_layers:
            raise ConfigError(
                f"config.json: 'layer_types' must list a kind for each of the {num_layers} layers, not {given!r}"
            )
        return given[:num_layers]
    if rule.from_layer is not None:
        first = _count("max_window_layers", config.get("max_window_layers", rule.from_layer), least=0)
        return [_SLIDING if layer >= first else "full" for layer in range(num_layers)]
    period = rule.period
    if rule.pattern_key:
        period = _count("sliding_window_pattern", config.get("sliding_window_pattern", period))
    return [_SLIDING if (layer + 1) % period else "full" for layer in range(num_layers)]


def _count(key: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"config.json: {key!r} is {value!r}, but must be a whole number of at least {least}")
    return value
