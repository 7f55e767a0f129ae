"""Special tokens that one request wants as text: markers of tool calls and of thoughts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from dist_infer.engine.detokenizer import TokenKinds

Decode = Callable[[Sequence[int]], str]


def keeping(
    kept: Collection[int], decode: Decode, decode_special: Decode | None, kinds: TokenKinds | None
) -> tuple[Decode, TokenKinds | None]:
    """Decoder and kinds for a request that keeps these ids; the given ones when it keeps none.

    Every other special token stays as silent as it was, also alone, as in log-probabilities.
    """
    if not kept or decode_special is None or kinds is None:
        return decode, kinds
    silent, whole = kinds.silent - frozenset(kept), decode_special
    return lambda ids: whole([id for id in ids if id not in silent]), replace(kinds, silent=silent)
