"""What a sequence of a type that is not packed keeps, found by one run of its class on the meta device."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dist_infer.model.adapter import meta_model
from dist_infer.model.sequence_cache import SequenceCache
from partition.errors import UnsupportedModelError

_TOKENS = 5
_meta: Any = importlib.import_module("torch.fx.experimental._config")  # made of settings that type checkers do not see


@dataclass(frozen=True, kw_only=True)
class SequenceKeeps:
    """`state_elements`: of all layers, whatever the length. `kv_elements[i]`: of a token in layer i.

    `eager`: the class computes all scores of a chunk at once, having no other attention.
    """

    state_elements: int
    kv_elements: tuple[int, ...]
    eager: bool


def probe_cache(config: Mapping[str, Any], num_layers: int, usual_row: int) -> SequenceKeeps:
    """usual_row: elements of a token's keys and values by the config, for layers that the run does not reach.

    Raises UnsupportedModelError where it does not reach a layer that may keep something else.
    """
    model = meta_model(config, torch.float32, path="fallback", experts="batched_mm")
    cache = SequenceCache(model.config, range(num_layers))
    arguments = inspect.signature(type(model).forward).parameters
    name = "cache_params" if "cache_params" in arguments else "past_key_values"
    failure: Exception | None = None
    try:
        # what depends on data has no shape there: for once all of it
        with torch.inference_mode(), _meta.patch(meta_nonzero_assume_all_nonzero=True):
            model(torch.zeros(1, _TOKENS, dtype=torch.long, device="meta"), use_cache=True, **{name: cache})
    except Exception as error:  # whatever a class cannot do without data
        failure = error
    layers = [*cache.layers, *[None] * (num_layers - len(cache.layers))]
    plain = (DynamicLayer, DynamicSlidingWindowLayer, type(None))
    if failure is not None and not all(type(layer) in plain for layer in layers):
        raise UnsupportedModelError(
            f"{model.config.model_type}: what a sequence keeps in its layers cannot be found without weights "
            f"({type(failure).__name__}: {' '.join(str(failure).split())[:200]}), so no memory can be planned for it"
        ) from failure
    unreached = usual_row if failure is not None else 0
    return SequenceKeeps(
        state_elements=cache.num_state_elements,
        kv_elements=tuple(_of_a_token(layer) or unreached for layer in layers),
        eager=model.config._attn_implementation == "eager",
    )


def _of_a_token(layer: Any) -> int:
    """Keys and values [.., T, D], and keys of an indexer [B, T, D]; 0 for a layer without any."""
    held = [tensor for name in ("keys", "values", "indexer_keys") if (tensor := getattr(layer, name, None)) is not None]
    return sum(tensor.numel() // tensor.shape[-2] for tensor in held if tensor.ndim > 1)
