"""Token ids to text, piece by piece, so that a piece once given never changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
_CONTEXT_TOKENS = 6
_MAX_CONTEXT_TOKENS = 24
_MAX_HELD_TOKENS = 24  # a character has 4 bytes; whoever holds more than this is no character to be


class Detokenizer:
    """Decodes a window at the end of the tokens, not all of them, for each token.

        ids   ... p p p p | t t t | t t t t
                   window ────────────────>   `decode(window)[:num_given]` was given out or is context
                            clean   clean

    The window starts with tokens whose text is known already, because a decoder may treat the first one differently
    (a stripped blank). A U+FFFD at the end may be the first bytes of a character: it is held back. At a clean end the
    window shrinks to the tokens since the last clean end, if these alone decode to the end of the same text.
    The prompt's tokens are context and never given out. `decode` may raise; so does `push` then.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._prompt_tail = list(prompt_token_ids[-_MAX_CONTEXT_TOKENS:])
        self._window: list[int] | None = None  # built at the first push: the owner's thread pays, and sees the error
        self._num_given = 0  # characters of the window's text
        self._num_context = 0  # tokens of the window up to the last clean end

    def push(self, token_ids: Sequence[int]) -> str:
        """The new text that is certain; may be empty."""
        window = self._window if self._window is not None else self._begin()
        window.extend(token_ids)
        text = self._decode(window)
        num_held = len(window) - self._num_context
        if not text.endswith(REPLACEMENT):
            piece = self._give(text, len(text))
            self._shrink(text, self._num_context)
            self._num_context = len(window)
            return piece
        if num_held <= _MAX_HELD_TOKENS:
            return self._give(text, len(text.rstrip(REPLACEMENT)))
        piece = self._give(text, len(text) - 1)  # bytes that are no text: only the last sign can still change
        if num_held % _MAX_HELD_TOKENS == 1:
            self._shrink(text, len(window) - _CONTEXT_TOKENS)
        return piece

    def flush(self) -> str:
        """All that was held back; the end."""
        if self._window is None:
            return ""
        text = self._decode(self._window)
        return self._give(text, len(text))

    def _begin(self) -> list[int]:
        window = self._prompt_tail[-_CONTEXT_TOKENS:]
        text = self._decode(window) if window else ""
        # do not begin inside a character
        while text.startswith(REPLACEMENT) and len(window) < len(self._prompt_tail):
            window = self._prompt_tail[-len(window) - 1 :]
            text = self._decode(window)
        self._num_given = len(text)
        self._num_context = len(window)
        self._window = window
        return window

    def _give(self, text: str, end: int) -> str:
        piece = text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece

    def _shrink(self, text: str, start: int) -> None:
        """Let go of the window's tokens before `start`, when nothing that is still to come can show it."""
        if start <= 0 or self._window is None:
            return
        rest = self._decode(self._window[start:])
        num_given = self._num_given - (len(text) - len(rest))
        if rest and num_given > 0 and text.endswith(rest):
            del self._window[:start]
            self._num_given = num_given
            self._num_context = max(0, self._num_context - start)
