"""What is asked: random words of a length drawn from a distribution, or the lines of a file."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dist_infer.prompt_config import ChatPrompt
from dist_infer.prompts_file import read_prompts
from partition.errors import ConfigError

MAX_WORDS = 1 << 20
_SYLLABLES = ("ba", "co", "di", "fu", "ga", "he", "ki", "lo", "mu", "na", "po", "ra", "se", "to", "va", "ze")
_SHAPES = "fixed:N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"

Question: TypeAlias = str | ChatPrompt


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A distribution of prompt lengths, in words. lognormal: median `low`, standard deviation `sigma` of the log."""

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int
    high: int = 0
    sigma: float = 0.0

    def draw(self, random_: random.Random) -> int:
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return random_.randint(self.low, self.high)
        return max(1, min(MAX_WORDS, round(random_.lognormvariate(math.log(self.low), self.sigma))))


def read_lengths(text: str) -> Lengths:
    """`fixed:128`, `uniform:16:256`, `lognormal:100:0.8`. Raises ConfigError."""
    kind, *numbers = text.split(":")
    try:
        if kind == "fixed" and len(numbers) == 1:
            found = Lengths(kind="fixed", low=int(numbers[0]))
        elif kind == "uniform" and len(numbers) == 2:
            found = Lengths(kind="uniform", low=int(numbers[0]), high=int(numbers[1]))
        elif kind == "lognormal" and len(numbers) == 2:
            found = Lengths(kind="lognormal", low=int(numbers[0]), sigma=float(numbers[1]))
        else:
            raise ValueError("not one of the shapes")
    except ValueError:
        raise ConfigError(f"--prompt-words {text!r}: write {_SHAPES}, with numbers") from None
    if not 1 <= found.low <= MAX_WORDS or (found.kind == "uniform" and not found.low <= found.high <= MAX_WORDS):
        raise ConfigError(f"--prompt-words {text!r}: lengths go from 1 to {MAX_WORDS} words, the lower one first")
    if not 0 <= found.sigma <= 5:
        raise ConfigError(f"--prompt-words {text!r}: SIGMA goes from 0 to 5")
    return found


def random_prompts(lengths: Lengths, seed: int) -> Iterator[Question]:
    """Made-up words, for ever. No two prompts begin alike, so that no server can reuse a prefix."""
    draw = random.Random(seed)
    while True:
        yield " ".join("".join(draw.choices(_SYLLABLES, k=2)) for _ in range(lengths.draw(draw)))


def prompts_of_file(path: Path, seed: int) -> Iterator[Question]:
    """The file's lines (see dist_infer.prompts_file), shuffled, over and over. Reads it now; raises ConfigError."""
    return _shuffled(read_prompts(path), random.Random(seed))


def _shuffled(questions: Sequence[Any], draw: random.Random) -> Iterator[Question]:
    while True:
        for question in draw.sample(questions, k=len(questions)):
            yield question if isinstance(question, str | ChatPrompt) else ChatPrompt(messages=question)
