"""Pieces joined are the text, whatever the cut; an unfinished character is never shown."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dist_infer.engine.detokenizer import REPLACEMENT, Detokenizer, TokenKinds


def bytes_decode(ids: Sequence[int]) -> str:
    """A byte-level tokenizer: one token, one byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def fallback_decode(ids: Sequence[int]) -> str:
    """As sentencepiece decoders do: bytes in a row are one text or as many U+FFFD, a special token is nothing, and the
    first blank is stripped.
    """
    text, run = "", b""
    for token in [*ids, 1000]:
        if token < 256:
            run += bytes([token])
            continue
        try:
            text += run.decode("utf-8")
        except UnicodeDecodeError:
            text += REPLACEMENT * len(run)
        run = b""
        text += {1000: "", 1001: " world", 1002: "x", 1003: " ", 1004: ""}[token]
    return text.removeprefix(" ")


def cut(ids: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    """`ids` in pieces of the sizes, then one by one."""
    pieces, at = [], 0
    for size in [*sizes, *[1] * len(ids)]:
        if at < len(ids):
            pieces.append(ids[at : at + size])
            at += size
    return pieces


@given(st.text(), st.text(), st.lists(st.integers(1, 5)))
def test_pieces_join_to_the_text(prompt: str, answer: str, sizes: list[int]) -> None:
    detokenizer = Detokenizer(bytes_decode, list(prompt.encode()))
    pieces = [detokenizer.push(piece) for piece in cut(list(answer.encode()), sizes)]
    assert "".join(pieces) + detokenizer.flush() == answer
    if REPLACEMENT not in answer:
        assert REPLACEMENT not in "".join(pieces)


@given(st.binary(max_size=200), st.lists(st.integers(1, 5)))
def test_bytes_that_are_no_text_are_kept_too(answer: bytes, sizes: list[int]) -> None:
    detokenizer = Detokenizer(bytes_decode, list(b"prompt"))
    pieces = [detokenizer.push(piece) for piece in cut(list(answer), sizes)]
    assert "".join(pieces) + detokenizer.flush() == bytes_decode(list(answer))


@given(st.text(alphabet="a é你好😀"), st.lists(st.sampled_from([1001, 1002, 1003, 1004]), max_size=3))
def test_byte_fallback_runs_and_stripped_blanks(answer: str, words: list[int]) -> None:
    """A window that starts inside a run of bytes, or that lets the decoder strip a blank, loses text."""
    ids = [*words, *answer.encode(), *words, *answer.encode()]
    detokenizer = Detokenizer(fallback_decode, [1002])
    pieces = [detokenizer.push([token]) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == fallback_decode([1002, *ids])[1:]


@given(st.lists(st.sampled_from([0xE4, 0xBD, 0xA0, 0xFF, ord("a"), 1001, 1002, 1003, 1004]), max_size=60))
@example([0xFF, *"你".encode() * 30, 1002])
@example([*"你".encode() * 30, 0xFF])
def test_a_bad_byte_spoils_its_whole_row(answer: list[int]) -> None:
    """Characters shown before the bad byte came could not be taken back: a row of byte tokens waits for its end."""
    kinds = TokenKinds(silent=frozenset({1004}), byte_values={byte: byte for byte in range(256)})
    detokenizer = Detokenizer(fallback_decode, [1002], kinds)
    pieces = [detokenizer.push([token]) for token in answer]
    assert "".join(pieces) + detokenizer.flush() == fallback_decode([1002, *(t for t in answer if t != 1004)])[1:]


def test_without_knowing_the_bytes_a_long_broken_row_stays_broken() -> None:
    """A window cut inside the row would find characters in what is left of it."""
    row = [0xFF, *"你".encode() * 30]
    detokenizer = Detokenizer(fallback_decode, [1002])
    pieces = [detokenizer.push([byte]) for byte in row]
    assert "".join(pieces) + detokenizer.flush() == REPLACEMENT * len(row)


def test_a_row_of_bytes_is_given_when_it_ends_or_breaks() -> None:
    kinds = TokenKinds(byte_values={byte: byte for byte in range(256)})
    detokenizer = Detokenizer(fallback_decode, [1002], kinds)
    assert [detokenizer.push([token]) for token in (*"é".encode(), 1002, 0x61, 0xFF, 0x61)] == [
        "", "", "éx", "", REPLACEMENT * 2, REPLACEMENT
    ]  # fmt: skip


def test_an_answer_may_go_on_with_the_row_of_bytes_its_prompt_ends_with() -> None:
    """Its first byte may complete a character of the prompt, or break the row."""
    kinds = TokenKinds(byte_values={byte: byte for byte in range(256)})
    prompt = [1002, *"你".encode() * 12]
    detokenizer = Detokenizer(fallback_decode, prompt[:-1], kinds)
    assert [detokenizer.push([token]) for token in (prompt[-1], ord("a"), 1002)] == ["", "", "你ax"]
    detokenizer = Detokenizer(fallback_decode, prompt, kinds)
    assert [detokenizer.push([token]) for token in (ord("a"), 1002)] == ["", "ax"]


def test_prompt_tail_does_not_begin_inside_a_character() -> None:
    """With one token a byte the last tokens of this prompt start in the middle of a character."""
    prompt = list("你好你好é".encode())
    detokenizer = Detokenizer(fallback_decode, prompt)
    assert [detokenizer.push([byte]) for byte in "é".encode()] == ["", "é"]


@pytest.mark.parametrize("token", [0x80, 0xE4, ord("a")])
def test_work_for_each_token_is_bounded(token: int) -> None:
    """A model that emits broken bytes for ever must not make each token dearer than the last, nor hold all back."""
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return bytes_decode(ids)

    detokenizer = Detokenizer(decode, list(b"prompt"))
    text = "".join(detokenizer.push([token]) for _ in range(500))
    assert longest <= 40
    assert len(text) > 450
    assert text + detokenizer.flush() == bytes_decode([token] * 500)


def test_nothing_pushed_is_nothing_flushed() -> None:
    assert Detokenizer(bytes_decode, list(b"prompt")).flush() == ""
