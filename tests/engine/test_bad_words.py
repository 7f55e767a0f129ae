"""Words become the token sequences that would complete them, at the beginning of a text and after a space."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dist_infer.engine.bad_words import bad_word_ids
from partition.errors import ConfigError


def by_bytes(text: str) -> Sequence[int]:
    return list(text.encode())


def test_a_word_is_forbidden_with_and_without_a_space() -> None:
    assert bad_word_ids(["ab"], by_bytes) == ((97, 98), (32, 97, 98))
    assert bad_word_ids([" ab"], by_bytes) == ((97, 98), (32, 97, 98))


def test_equal_sequences_come_once_and_empty_ones_not_at_all() -> None:
    def stripping(text: str) -> Sequence[int]:
        return by_bytes(text.strip())

    assert bad_word_ids(["a", "a", "b"], stripping) == ((97,), (98,))
    assert bad_word_ids([" "], by_bytes) == ((32,), (32, 32))


def test_a_word_without_tokens_is_refused_by_name() -> None:
    """It would forbid the empty sequence, or be accepted and do nothing."""
    with pytest.raises(ConfigError, match="bad_words: 'x' has no tokens"):
        bad_word_ids(["ab", "x"], lambda text: [] if "x" in text else [1])
