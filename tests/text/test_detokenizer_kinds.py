"""Pieces joined are what the tokenizer decodes, for tokenizers of every kind and whatever the model emits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS

from dist_infer.engine.detokenizer import REPLACEMENT, Detokenizer, TokenKinds
from dist_infer.engine.stop_checker import StopChecker
from dist_infer.tokenizer import Tokenizer

Make = Callable[[str], Tokenizer]
ALL = pytest.mark.parametrize("kind", [*KINDS, pytest.param("smollm2", marks=pytest.mark.slow)])
UNKNOWN_IDS = 3  # a model's vocabulary is often padded beyond the tokenizer's
FAMILY = "👨‍👩‍👧‍👦"  # four emoji joined, 25 bytes
ANYTHING = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
_WORDS = [*"ae .,'\n你é", FAMILY, "👍🏽", "don't", "  ", " Anne", "<|eot|>", "世界"]
FAMILIAR = st.lists(st.sampled_from(_WORDS)).map("".join)
ONLY_SOME = settings(max_examples=40, deadline=None)


def vocab_size(tokenizer: Tokenizer) -> int:
    return tokenizer.vocab_size + UNKNOWN_IDS


@functools.cache
def kinds_of(tokenizer: Tokenizer, skip: bool) -> TokenKinds:
    return tokenizer.token_kinds(vocab_size(tokenizer), skip_special_tokens=skip)


def pieces_of(
    tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), *, skip: bool = True, step: int = 1
) -> list[str]:
    detokenizer = Detokenizer(
        lambda some: tokenizer.decode(some, skip_special_tokens=skip),
        prompt,
        kinds_of(tokenizer, skip),
    )
    pieces = [detokenizer.push(ids[at : at + step]) for at in range(0, len(ids), step)]
    return [*pieces, detokenizer.flush()]


def check(tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool = True, step: int = 1) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    pieces = pieces_of(tokenizer, ids, skip=skip, step=step)
    assert "".join(pieces) == whole
    assert sum(piece.count(REPLACEMENT) for piece in pieces) == whole.count(REPLACEMENT)


@ALL
@ONLY_SOME
@given(text=ANYTHING | FAMILIAR, skip=st.booleans(), step=st.integers(1, 4))
def test_the_tokens_of_a_text_come_back_as_it_decodes(
    tokenizer: Make, kind: str, text: str, skip: bool, step: int
) -> None:
    check(tokenizer(kind), tokenizer(kind).encode(text), skip=skip, step=step)


@ALL
@ONLY_SOME
@given(numbers=st.lists(st.integers(0, 10**6), max_size=80), skip=st.booleans(), step=st.integers(1, 4))
def test_tokens_drawn_at_random_come_back_as_they_decode(
    tokenizer: Make, kind: str, numbers: list[int], skip: bool, step: int
) -> None:
    """A hot model emits special tokens, halves of characters, and ids that no tokenizer knows."""
    some = tokenizer(kind)
    check(some, [number % vocab_size(some) for number in numbers], skip=skip, step=step)


@ALL
@ONLY_SOME
@given(data=st.data())
def test_few_tokens_again_and_again_come_back_as_they_decode(tokenizer: Make, kind: str, data: st.DataObject) -> None:
    """Long rows of blanks, of continuations, of skipped tokens and of bytes, good and bad, let a window go wrong."""
    some = tokenizer(kind)
    values = {value: id for id, value in kinds_of(some, True).byte_values.items()}
    bytes_ = [values[value] for value in (0xE4, 0xBD, 0xA0, 0x41) if value in values]
    few = data.draw(st.lists(st.integers(0, vocab_size(some) - 1), min_size=1, max_size=3))
    check(some, data.draw(st.lists(st.sampled_from(few + bytes_), max_size=120)))


@ALL
@ONLY_SOME
@given(prompt=FAMILIAR, answer=FAMILIAR)
def test_an_answer_goes_on_where_its_prompt_ends(tokenizer: Make, kind: str, prompt: str, answer: str) -> None:
    """Otherwise the blank between the two is lost, or the prompt shows."""
    some = tokenizer(kind)
    before, after = some.encode(prompt), some.encode(answer)
    shown, whole = some.decode(before), some.decode(before + after)
    assert whole == shown + "".join(pieces_of(some, after, before))


@ALL
@ONLY_SOME
@given(text=FAMILIAR, at=st.integers(0, 60), length=st.integers(1, 6), step=st.integers(1, 3))
def test_a_stop_string_ends_the_text_wherever_tokens_end(
    tokenizer: Make, kind: str, text: str, at: int, length: int, step: int
) -> None:
    some = tokenizer(kind)
    ids = some.encode(text)
    whole = some.decode(ids)
    stop = whole[at : at + length] or "Stop"
    checker, shown, found = StopChecker([stop]), "", None
    for piece in pieces_of(some, ids, step=step):
        text, found = checker.push(piece)
        shown += text
        assert whole.partition(stop)[0].startswith(shown)
        if found:
            break
    if found is None:
        shown += checker.flush()
    assert (shown, found or "") == whole.partition(stop)[:2]


@ALL
def test_a_character_of_many_tokens_is_never_shown_in_part(tokenizer: Make, kind: str) -> None:
    some = tokenizer(kind)
    pieces = pieces_of(some, some.encode(f"a{FAMILY}b"))
    assert not any(REPLACEMENT in piece for piece in pieces)


@ALL
@pytest.mark.parametrize("what", ["text", "one id", "skipped", "bad bytes"])
def test_the_work_for_a_token_does_not_grow(tokenizer: Make, kind: str, what: str) -> None:
    """Counted in tokens that are decoded, for every id that could stop the window from shrinking."""
    some, num_pushed, num_decoded = tokenizer(kind), 400, 0
    kinds = kinds_of(some, True)

    def decode(ids: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(ids)
        return some.decode(ids)

    rows = {
        "text": [(some.encode("Anne Elliot, 你好 don't ") * num_pushed)[:num_pushed]],
        "one id": [[id] * num_pushed for id in range(0, some.vocab_size, 1 + some.vocab_size // 60)],
        "skipped": [[id] * num_pushed for id in list(kinds.silent)[:3]],
        "bad bytes": [[id] * num_pushed for id, value in kinds.byte_values.items() if value in (0x41, 0x80, 0xE4)],
    }
    for row in rows[what]:
        num_decoded = 0
        detokenizer = Detokenizer(decode, some.encode("A prompt"), kinds)
        text = "".join([*(detokenizer.push((id,)) for id in row), detokenizer.flush()])
        assert num_decoded <= 60 * num_pushed, some.decode(row[:1])
        assert text.endswith(some.decode(row)[-num_pushed:])
