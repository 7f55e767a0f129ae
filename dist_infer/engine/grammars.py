"""What the engine asks about grammars: a port, since what compiles them is none of its business."""

from __future__ import annotations

from typing import Protocol

from dist_infer.grammar import Grammar
from dist_infer.vocabulary import Vocabulary


class Grammars(Protocol):
    """Any thread may call."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the model, for the ranks; asked for after a grammar was found good."""
        ...

    def check(self, grammar: Grammar) -> None:
        """ConfigError when no answer can follow it; may take a second."""
        ...
