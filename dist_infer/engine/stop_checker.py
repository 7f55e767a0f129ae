"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Lets text through up to the stop string that completes first; the longest one of those that end together.

    That is what reading character by character would find, so it does not depend on how the text is cut. Text that may
    be the beginning of a stop string is held back until it is clear, so no part of one that ends the text is ever let
    out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text to let out, and the stop string that ends it (then nothing more may be pushed) or None.

        A stop string counts when it completes within this piece. may_stop False: none of those that do counts, but one
        that begins here may complete later.
        """
        if not self._stops or not text:
            return text, None
        num_old = len(self._held)
        text = self._held + text
        if may_stop:
            firsts = ((text.find(stop, max(0, num_old - len(stop) + 1)), stop) for stop in self._stops)
            if found := [(at + len(stop), at, stop) for at, stop in firsts if at >= 0]:
                _, at, stop = min(found)
                self._held = ""
                return text[:at], stop
        num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What was held back: no stop string will come any more."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `stop`."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
