"""Texts that an answer must not contain, as the token sequences that would complete them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from partition.errors import ConfigError

Encode = Callable[[str], Sequence[int]]


def bad_word_ids(words: Iterable[str], encode: Encode) -> tuple[tuple[int, ...], ...]:
    """Each word as it stands at the beginning of a text and after a space, which most vocabularies write differently.

    encode: text -> token ids, without special tokens. ConfigError for a word of which no token is left. A word that can
    be cut into tokens in yet another way can still come in that way.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip() or word
        encoded = [tuple(encode(text)) for text in dict.fromkeys((bare, " " + bare))]
        if not any(encoded):
            raise ConfigError(f"bad_words: {word!r} has no tokens in this model's vocabulary: leave it out")
        found |= dict.fromkeys(ids for ids in encoded if ids)
    return tuple(found)
