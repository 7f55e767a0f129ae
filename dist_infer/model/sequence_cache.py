"""One sequence's own cache, for types that do not go through paged attention: the library's, on one stage's layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers.cache_utils import CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin

from dist_infer.messages import Chunk


class SequenceCache(DynamicCache):  # type: ignore[misc]
    """The library's cache of a sequence of which only the layers of one stage are filled.

    Model code asks layer 0 how long the sequence is, and any layer of a kind how wide its mask is: it is answered from
    `num_computed`, the tokens before the chunk in hand, whichever layers are here and however far they are.
    """

    def __init__(self, config: Any, own: range) -> None:
        super().__init__(config=config)
        self._own = own
        self.num_computed = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if layer_idx in self._own and isinstance(self._layer(layer_idx), CacheLayerMixin):
            return int(super().get_seq_length(layer_idx))
        return self.num_computed

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.num_computed

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = self._layer(layer_idx)
        if not isinstance(layer, CacheLayerMixin):
            layer = next((one for one in self.layers if isinstance(one, CacheLayerMixin)), None)
        window = getattr(layer, "sliding_window", None)
        if not getattr(layer, "is_sliding", False) or window is None or self.num_computed < window:
            return self.num_computed + query_length, 0
        return window - 1 + query_length, self.num_computed - window + 1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is None:
            linear = [i for i in self._own if isinstance(self._layer(i), LinearAttentionCacheLayerMixin)]
            if not linear:
                return False
            layer_idx = linear[-1]
        return bool(super().has_previous_state(layer_idx, state_idx))

    @property
    def num_state_elements(self) -> int:
        """Of what does not grow with the sequence: convolution and recurrent states."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                held = (*layer.conv_states.values(), *layer.recurrent_states.values())
                total += sum(state.numel() for state in held if state is not None)
        return total

    def _layer(self, index: int) -> Any:
        return self.layers[index] if index < len(self.layers) else None


class SequenceCaches:
    """The caches of one stage's running requests. Owned by the stage runner."""

    def __init__(self, config: Any, own: range) -> None:
        self._config, self._own = config, own
        self._caches: dict[str, SequenceCache] = {}

    def __len__(self) -> int:
        return len(self._caches)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Of requests that ended or were put back into the queue."""
        for request_id in request_ids:
            self._caches.pop(request_id, None)

    def of(self, chunks: Sequence[Chunk]) -> SequenceCache:
        """The cache of the one sequence of these chunks, a new one where it begins."""
        (chunk,) = chunks
        if chunk.start == 0:
            self._caches[chunk.request_id] = SequenceCache(self._config, self._own)
        return self._caches[chunk.request_id]


def alone(chunks: Iterable[Chunk], *, stepwise: bool) -> Iterator[tuple[Chunk]]:
    """Each sequence by itself; `stepwise`: and after its first chunk token by token."""
    for chunk in chunks:
        if not stepwise or chunk.start == 0:
            yield (chunk,)
            continue
        last = chunk.num_tokens - 1
        for index in range(chunk.num_tokens):
            yield (replace(chunk, start=chunk.start + index, num_tokens=1, sample=chunk.sample and index == last),)
