"""What the client saw of one request."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(kw_only=True)
class Record:
    """Written by the request's task, read by all when it has ended. Times are in seconds of the run's clock.

    due_s: when it should be sent; sent_s: when it was. chunk_s: when each piece of the answer came. num_output_tokens
    and num_prompt_tokens: as the server says, None when it does not. error: what went wrong, by kind.
    """

    due_s: float
    sent_s: float = 0.0
    end_s: float = 0.0
    chunk_s: array[float] = field(default_factory=lambda: array("d"))
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    detail: str = ""

    @property
    def num_tokens(self) -> int:
        """Of the answer; pieces are counted where the server tells no number."""
        return len(self.chunk_s) if self.num_output_tokens is None else self.num_output_tokens

    @property
    def ttft_s(self) -> float | None:
        """From when it was due: a late client must not make a server look fast."""
        return self.chunk_s[0] - self.due_s if self.chunk_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token behind the first."""
        if len(self.chunk_s) < 2 or self.num_tokens < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.num_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.due_s

    def gaps_s(self) -> Iterator[float]:
        """Times between pieces."""
        return (after - before for before, after in pairwise(self.chunk_s))
