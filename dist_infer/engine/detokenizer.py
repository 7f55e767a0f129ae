"""Token ids to text, piece by piece, so that a piece once given never changes."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
_CONTEXT_TOKENS = 6
_MAX_CONTEXT_TOKENS = 24  # where the prompt ends inside a character
_MAX_CONTEXT_ROW = 512  # where it ends with a row of byte tokens
_MAX_WINDOW_TOKENS = 16  # beyond it the window is cut, if it can be
_MAX_HELD_TOKENS = 24  # a character has 4 bytes; whoever holds more than this is no character to be


@dataclass(frozen=True, kw_only=True)
class TokenKinds:
    """What cannot be seen from decoded text.

    silent: ids that decoding leaves out as if they were not there: special tokens that are skipped, ids that the
    tokenizer does not know. byte_values: the byte of each id that is one, where the decoder takes a row of such ids for
    one text: it is a text as a whole, or each of its bytes becomes a U+FFFD. Empty for byte-level tokenizers, in whose
    texts a bad byte spoils no other.
    """

    silent: frozenset[int] = frozenset()
    byte_values: Mapping[int, int] = field(default_factory=dict)


class Detokenizer:
    """Decodes a window at the end of the tokens, not all of them, for each token.

        ids   ... p p p p | t t t | t t t t
                   window ────────────────>   `decode(window)[:num_given]` was given out or is context
                            clean   clean

    The window starts with tokens whose text is known already, because a decoder may treat the first one differently
    (a stripped blank). A U+FFFD at the end may be the first bytes of a character: it is held back. So is a row of byte
    tokens until it ends or is broken, because one bad byte takes back the characters before it. At a clean end a long
    window shrinks, if what is left of it decodes to the end of the same text.
    The prompt's tokens are context and never given out. `decode` may raise; so does `push` then. Each token costs a
    decode of a bounded window; a row of bytes is decoded once.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_token_ids: Sequence[int],
        kinds: TokenKinds | None = None,
    ) -> None:
        self._decode = decode
        self._kinds = kinds or TokenKinds()
        self._prompt_tail = self._heard(prompt_token_ids[-_MAX_CONTEXT_ROW:])
        self._window: list[int] | None = None  # built at the first push: the owner's thread pays, and sees the error
        self._num_given = 0  # characters of the window's text
        self._num_clean = 0  # tokens of the window up to the last clean end
        self._cut_above = _MAX_WINDOW_TOKENS
        self._row = _ByteRow()

    def push(self, token_ids: Sequence[int]) -> str:
        """The new text that is certain; may be empty."""
        window = self._window if self._window is not None else self._begin()
        if not self._kinds.byte_values:
            return self._push(self._heard(token_ids))
        pieces = []
        for token_id in self._heard(token_ids):
            value = self._kinds.byte_values.get(token_id)
            if value is None:
                self._row = _ByteRow()
                pieces.append(self._push((token_id,)))
                continue
            window.append(token_id)
            was_broken = self._row.broken
            self._row.add(value)
            if was_broken:  # whatever comes, each of its bytes is a sign of its own
                self._num_given += 1
                pieces.append(REPLACEMENT)
            elif self._row.broken:
                text = self._decode(window)
                pieces.append(self._give(text, len(text)))
        return "".join(pieces)

    def flush(self) -> str:
        """All that was held back; the end."""
        if self._window is None:
            return ""
        text = self._decode(self._window)
        return self._give(text, len(text))

    def _heard(self, token_ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id not in self._kinds.silent]

    def _push(self, token_ids: Sequence[int]) -> str:
        """Tokens after which no row of bytes is open."""
        window = self._window
        if window is None or not token_ids:
            return ""
        window.extend(token_ids)
        text = self._decode(window)
        num_held = len(window) - self._num_clean
        if not text.endswith(REPLACEMENT):
            self._num_clean = len(window)
            piece = self._give(text, len(text))
            self._shrink(text)
            return piece
        if num_held <= _MAX_HELD_TOKENS:
            return self._give(text, len(text.rstrip(REPLACEMENT)))
        piece = self._give(text, len(text) - 1)  # bytes that are no text: only the last sign can still change
        if len(window) > _MAX_HELD_TOKENS + 2 * _CONTEXT_TOKENS:
            self._cut(text, len(window) - _CONTEXT_TOKENS)
        return piece

    def _begin(self) -> list[int]:
        tail, bytes_ = self._prompt_tail, self._kinds.byte_values
        start = max(0, len(tail) - _CONTEXT_TOKENS)
        text = self._decode(tail[start:]) if tail else ""
        # do not begin inside a character, nor inside a row of bytes
        while text.startswith(REPLACEMENT) and start > 0 and len(tail) - start < _MAX_CONTEXT_TOKENS:
            start -= 1
            text = self._decode(tail[start:])
        while start > 0 and tail[start] in bytes_ and tail[start - 1] in bytes_:
            start -= 1
        window = tail[start:]
        for token_id in window:
            if token_id in bytes_:
                self._row.add(bytes_[token_id])
            else:
                self._row = _ByteRow()
        # the first bytes of a character are not the prompt's text: who completes them gives it
        num_whole = len(window) - self._row.num_pending
        self._num_given = len(self._decode(window[:num_whole])) if num_whole else 0
        self._num_clean = len(window)
        self._window = window
        return window

    def _give(self, text: str, end: int) -> str:
        piece = text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece

    def _shrink(self, text: str) -> None:
        """At a clean end: keep a few tokens of a long window. Tries again at twice the length if that cannot be."""
        window = self._window
        if window is None or len(window) <= self._cut_above:
            return
        for start in range(len(window) - _CONTEXT_TOKENS, len(window) - 2 * _CONTEXT_TOKENS, -1):
            if self._cut(text, start):
                self._cut_above = _MAX_WINDOW_TOKENS
                return
        self._cut_above = 2 * len(window)

    def _cut(self, text: str, start: int) -> bool:
        """Let go of the window's tokens before `start`, when the rest decodes to the same end.

        What is held back is shorter than the rest, so nothing that is still to come can show the cut.
        """
        window = self._window
        if window is None or start <= 0:
            return False
        rest = self._decode(window[start:])
        num_given = self._num_given - (len(text) - len(rest))
        num_odd = len(rest) - _common_end(text, rest)  # characters that differ: a first token may look different
        if (
            num_given <= 0
            or num_odd > num_given
            or (num_odd and num_odd > len(self._decode(window[start : start + 1])))
        ):
            return False
        del window[:start]
        self._num_given = num_given
        self._num_clean = max(0, self._num_clean - start)
        return True


def _common_end(a: str, b: str) -> int:
    """Length of the longest end that both have."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return next((at for at, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


class _ByteRow:
    """Whether the bytes of a row can still become a text."""

    def __init__(self) -> None:
        self.broken = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")

    @property
    def num_pending(self) -> int:
        """Bytes at the end that begin a character."""
        return 0 if self.broken else len(self._decoder.getstate()[0])

    def add(self, value: int) -> None:
        if self.broken:
            return
        try:
            self._decoder.decode(bytes((value,)))
        except UnicodeDecodeError:
            self.broken = True
