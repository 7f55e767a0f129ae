"""Tokenizers that are made once for all tests here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizer_kinds import make_tokenizer

from dist_infer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """tokenizer(kind), of tokenizer_kinds.KINDS or "smollm2"."""
    made: dict[str, Tokenizer] = {}

    def make(kind: str) -> Tokenizer:
        if kind not in made:
            made[kind] = make_tokenizer(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make
