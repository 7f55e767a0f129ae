"""A stop string never shows, not even a part of it, however the text is cut."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from dist_infer.engine.stop_checker import StopChecker

ALPHABET = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def letter_by_letter(text: str, stops: list[str], num_free: int = 0) -> tuple[str, str | None]:
    """What is meant: the first stop string to complete ends the text; of several the longest.

    Those that complete in the first `num_free` letters do not count.
    """
    for end in range(num_free + 1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(ALPHABET, STOPS, st.lists(st.integers(1, 6)))
@example("abab", ["abb", "b"], [])
@example("aab", ["ab"], [2])
def test_equals_reading_letter_by_letter(text: str, stops: list[str], sizes: list[int]) -> None:
    checker = StopChecker(stops)
    expected, expected_stop = letter_by_letter(text, stops)
    shown, stop, at = "", None, 0
    for size in [*sizes, *[1] * len(text)]:
        piece, stop = checker.push(text[at : at + size])
        at += size
        shown += piece
        assert expected.startswith(shown)
        if stop is not None:
            break
    if stop is None:
        shown += checker.flush()
    assert (shown, stop) == (expected, expected_stop)


@given(ALPHABET, STOPS, st.lists(st.integers(1, 6)), st.integers(0, 6))
@example("ab", ["ab"], [1, 1], 1)
@example("abx", ["abab", "b"], [2, 1], 1)
def test_a_stop_string_may_begin_where_none_may_end(text: str, stops: list[str], sizes: list[int], num: int) -> None:
    """The first `num` pieces are those of min_tokens: a stop string that began there was missed, and let out."""
    checker = StopChecker(stops)
    pieces, at = [], 0
    for size in [*sizes, *[1] * len(text)]:
        pieces.append(text[at : at + size])
        at += size
    expected, expected_stop = letter_by_letter(text, stops, len("".join(pieces[:num])))
    shown, stop = "", None
    for index, piece in enumerate(pieces):
        out, stop = checker.push(piece, may_stop=index >= num)
        shown += out
        if stop is not None:
            break
    if stop is None:
        shown += checker.flush()
    assert (shown, stop) == (expected, expected_stop)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["STOP"])
    assert checker.push("go ST") == ("go ", None)
    assert checker.push("AND ") == ("STAND ", None)
    assert checker.push("STO") == ("", None)
    assert checker.push("P it") == ("", "STOP")


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopChecker(()).push("STOP") == ("STOP", None)
