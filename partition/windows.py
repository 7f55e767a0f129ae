"""How far back each layer's attention looks, from config.json alone.

A family that is not named here is planned as if every layer saw everything, which is never wrong, only larger. Where a
window is planned, the rank checks at run time that the model class passes no larger one.
"""

from __future__ import annotations

from dataclasses import dataclass

from partition.config_keys import ConfigKeys
from partition.errors import ConfigError

_SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """How a family's config decides, beside `sliding_window` itself.

    `by_layer`: `layer_types` says which layers have it, else all have. Without that list every `period`-th layer sees
    everything (`sliding_window_pattern` overrides the period where `pattern_key`), or with `from_layer` layers from
    `max_window_layers` on have the window. `asked`: only with `use_sliding_window`.
    """

    by_layer: bool = True
    period: int = 0
    pattern_key: bool = False
    from_layer: bool = False
    asked: bool = False


RULES = {
    "mistral": WindowRule(by_layer=False),
    "mixtral": WindowRule(by_layer=False),
    "phi3": WindowRule(by_layer=False),
    "qwen3_moe": WindowRule(by_layer=False, asked=True),
    "qwen2": WindowRule(from_layer=True, asked=True),
    "qwen3": WindowRule(from_layer=True, asked=True),
    "gemma2": WindowRule(period=2),
    "gemma3_text": WindowRule(period=6, pattern_key=True),
    "cohere2": WindowRule(period=4, pattern_key=True),
    "gpt_oss": WindowRule(period=2),
}


def windows_of(keys: ConfigKeys, num_layers: int) -> tuple[int | None, ...]:
    """For each layer the number of last positions it attends to, its own included; None: all of them.

    keys: of a family of the table. Raises ConfigError for a senseless key.
    """
    rule = RULES.get(keys.model_type)
    everything: tuple[int | None, ...] = (None,) * num_layers
    if rule is None or (rule.asked and not keys.get("use_sliding_window")) or keys.get("sliding_window") is None:
        return everything
    window = keys.count("sliding_window")
    if not rule.by_layer:
        return (window,) * num_layers
    return tuple(window if kind == _SLIDING else None for kind in _layer_types(keys, rule, num_layers))


def _layer_types(keys: ConfigKeys, rule: WindowRule, num_layers: int) -> list[str]:
    given = keys.get("layer_types")
    if given is not None:
        if not isinstance(given, list) or len(given) < num_layers:
            raise ConfigError(
                f"config.json: 'layer_types' must list a kind for each of the {num_layers} layers, not {given!r}"
            )
        return given[:num_layers]
    if rule.from_layer:
        first = keys.count("max_window_layers", least=0)
        return [_SLIDING if layer >= first else "full" for layer in range(num_layers)]
    period = keys.count("sliding_window_pattern", absent=rule.period) if rule.pattern_key else rule.period
    return [_SLIDING if (layer + 1) % period else "full" for layer in range(num_layers)]
