"""Layers to pipeline stages: contiguous, with the smallest possible largest stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from partition.errors import ConfigError


def cut_stages(
    layer_bytes: Sequence[int],
    *,
    embed_bytes: int,
    head_bytes: int,
    num_stages: int,
    shares: Sequence[float] | None = None,
) -> tuple[tuple[int, int], ...]:
    """Half-open layer ranges, one a stage, each with at least one layer.

    The embedding weighs on the first stage, the head on the last. Among the cuts whose largest stage is smallest, the
    most even one (least sum of squares) is taken. With `shares` a stage is as large as its bytes are to its share.
    Raises ConfigError for more stages than layers.
    """
    num_layers = len(layer_bytes)
    if num_stages < 1 or num_stages > num_layers:
        raise ConfigError(
            f"parallel.pipeline is {num_stages}, but the model has {num_layers} layers: use 1 to {num_layers}"
        )
    sums = [0, *itertools.accumulate(layer_bytes)]

    def weight(stage: int, first: int, end: int) -> float:
        ends = (embed_bytes if stage == 0 else 0) + (head_bytes if stage == num_stages - 1 else 0)
        num_bytes = sums[end] - sums[first] + ends
        return num_bytes if shares is None else num_bytes / shares[stage]

    def firsts(stage: int, end: int) -> range:
        return range(stage, end) if stage else range(1)

    # largest[end]: of the best cut of layers [0, end) into the stages so far, its largest stage
    largest: dict[int, float] = {0: 0}
    for stage in range(num_stages):
        largest = {
            end: min(max(largest[first], weight(stage, first, end)) for first in firsts(stage, end) if first in largest)
            for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1)
        }
    limit = largest[num_layers]

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0, (0,))}  # end -> (sum of squares, edges)
    for stage in range(num_stages):
        best = {
            end: min(choices)
            for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1)
            if (
                choices := [
                    (best[first][0] + weight(stage, first, end) ** 2, (*best[first][1], end))
                    for first in firsts(stage, end)
                    if first in best and weight(stage, first, end) <= limit
                ]
            )
        }
    return tuple(itertools.pairwise(best[num_layers][1]))
