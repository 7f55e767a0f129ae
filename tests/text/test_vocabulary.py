"""What each token adds to a text, as the decoder has it: a grammar over other bytes would allow the wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_kinds import KINDS, make_tokenizer

from dist_infer.errors import ConfigError
from dist_infer.grammar import Grammar
from dist_infer.grammar_matcher import GrammarTokens, Matcher

CONTEXT = {"wordpiece", "word-level", "suffix-bpe"}  # where a token's blanks depend on its neighbours
TEXT = '{"naïve key": [1, "x  y\\n"], "z": "Grüße"}'


@pytest.mark.parametrize("kind", [kind for kind in (*KINDS, "smollm2") if kind not in CONTEXT])
def test_texts_are_those_of_the_decoder(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind, tmp_path)
    vocabulary = tokenizer.vocabulary(tokenizer.vocab_size + 5)
    assert len(vocabulary) == tokenizer.vocab_size + 5
    assert vocabulary.texts[-5:] == ("",) * 5
    ids = tokenizer.encode("a" + TEXT, add_special_tokens=False)
    joined = b"".join(vocabulary.texts[id].encode("latin-1") for id in ids if id not in vocabulary.special_ids)
    assert joined.decode().lstrip(" ") == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", sorted(CONTEXT))
def test_tokens_that_depend_on_their_neighbours_know_no_grammar(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind, tmp_path)
    with pytest.raises(ConfigError, match="cannot follow a grammar"):
        tokenizer.vocabulary(tokenizer.vocab_size)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "legacy-llama", "unigram-bytes"])
def test_a_matcher_follows_the_models_own_tokens(kind: str, tmp_path: Path) -> None:
    """The blank of a sentencepiece token is a blank, not its sign for one."""
    tokenizer = make_tokenizer(kind, tmp_path)
    vocabulary = tokenizer.vocabulary(tokenizer.vocab_size)
    matcher = Matcher(Grammar.choice(["a red, große rose"]), GrammarTokens(vocabulary))
    left = b"a red, " + "große rose".encode()
    while left:  # the longest token that goes on, which for these texts is among the tokenizer's own kinds of tokens
        mask = matcher.mask()
        allowed = [id for id in range(len(vocabulary)) if mask[id // 8] >> id % 8 & 1]
        texts = {id: vocabulary.texts[id].encode("latin-1") for id in allowed}
        assert all(left.startswith(text) and text for text in texts.values())
        assert not set(allowed) & set(vocabulary.special_ids)
        best = max(allowed, key=lambda id: len(texts[id]))
        matcher.consume([best])
        left = left[len(texts[best]) :]
    assert matcher.must_end
