"""The port of answer parsers: text in as the model writes it, deltas out."""

from __future__ import annotations

from typing import Protocol

from dist_infer.openai.tools.deltas import Delta, Flushed


class ToolParser(Protocol):
    """Reads one answer. However its text is cut into pieces, the joined deltas are the same.

    Never raises for what a model wrote: what is no call is content.
    """

    @property
    def wants_stop(self) -> bool:
        """Whether nothing more can come of this answer: it had its one call, and may be ended (`tool_calls`)."""

    def push(self, text: str) -> list[Delta]:
        """What has become certain with this piece of text."""

    def flush(self) -> Flushed:
        """What was held back, now that the answer has ended. Called once, last."""
