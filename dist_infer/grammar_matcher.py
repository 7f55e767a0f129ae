"""Grammars at work, by llguidance: which tokens may come next. The only module that imports it; no torch.

The tokens that stand for a text are the model's choice: no one way to write it is forced.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any

from dist_infer.grammar import Grammar
from dist_infer.vocabulary import Vocabulary
from partition.errors import ConfigError

_MAX_MESSAGE_CHARS = 300
# Whatever a user's grammar says, a compilation stays in the tenths of a second and a mask in tens of milliseconds.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,  # 20 ms
    "step_lexer_fuel": 200_000,  # 15 ms
    "step_max_items": 10_000,  # 100 ms where they are ambiguous
    "max_lexer_states": 50_000,  # 100 MB at most, seldom more than 10
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Blanks as people and models write them, but not without end: a model can be caught in them.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r" |\r?\n[ \t]{0,64}", "lenient": False}
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'  # the last such line counts


class GrammarTokens:
    """A vocabulary as llguidance wants it; making it takes tenths of a second. Shared by matchers, any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        require_llguidance()
        from llguidance import LLTokenizer, TokenizerWrapper

        self.inner = LLTokenizer(TokenizerWrapper(_Words(vocabulary)))
        self.end_id = len(vocabulary)


class Matcher:
    """One answer on its way through a grammar. Raises ConfigError where the grammar, or a limit, ends it for good.

    Not for two threads at once. The slow methods (the constructor, `mask`, `consume`) let other threads run.
    """

    def __init__(self, grammar: Grammar, tokens: GrammarTokens) -> None:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**_LIMITS)
        self._inner: Any = LLMatcher(tokens.inner, _lark(grammar), log_level=0, limits=limits)
        self._end_id = tokens.end_id
        self._raise_error()

    def copy(self) -> Matcher:
        """Another answer at the same place."""
        twin = object.__new__(Matcher)
        twin._inner, twin._end_id = self._inner.deep_copy(), self._end_id
        return twin

    def mask(self) -> bytes:
        """A bit for each token, low bits first, set where it may come next; none is set for an end of the answer."""
        bits = bytearray(self._inner.compute_bitmask())
        self._raise_error()
        bits[self._end_id // 8] &= ~(1 << self._end_id % 8) & 0xFF
        return bytes(bits)

    def consume(self, token_ids: Sequence[int]) -> None:
        """They have come."""
        if not self._inner.consume_tokens(list(token_ids)):
            self._raise_error()
            raise ConfigError("the grammar does not go on like this")

    @property
    def may_end(self) -> bool:
        """What has come so far is a whole answer."""
        return bool(self._inner.is_accepting())

    @property
    def must_end(self) -> bool:
        """It is one, and nothing can follow."""
        return bool(self._inner.is_stopped())

    def _raise_error(self) -> None:
        if self._inner.is_error():
            raise ConfigError(f"the grammar cannot be used: {_shortened(self._inner.get_error())}")


def require_llguidance() -> None:
    if importlib.util.find_spec("llguidance") is None:
        raise ConfigError("a grammar needs the package llguidance: `pip install 'dist-infer[serve]'`")


class _Words:
    """What llguidance asks of a tokenizer. Its end of text is an id of its own: which ids end an answer is ours."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = [text.encode("latin-1") for text in vocabulary.texts] + [b"<|end of answer|>"]
        self.eos_token_id = len(vocabulary)
        self.bos_token_id = None
        self.special_token_ids = [*vocabulary.special_ids, self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        raise RuntimeError("nothing is tokenized: no token is forced")


def lark_rule(grammar: Grammar) -> str:
    """What of a grammar that is no Lark stands behind the name of a Lark rule. ConfigError without llguidance."""
    match grammar.kind:
        case "regex":  # \d and \w as in JSON Schema: ASCII
            require_llguidance()
            from llguidance import regex_to_lark

            return "/" + regex_to_lark(grammar.text, "dw").replace("\n", "\\n") + "/"
        case "choice":
            return " | ".join(json.dumps(choice) for choice in grammar.choices)
        case "json_object":
            return "%json " + json.dumps({"type": "object", "x-guidance": _JSON_OPTIONS})
        case "json_schema":
            return "%json " + json.dumps({**json.loads(grammar.text), "x-guidance": _JSON_OPTIONS})
    raise RuntimeError(f"a grammar of kind {grammar.kind} is no rule")


def _lark(grammar: Grammar) -> str:
    rules = grammar.text if grammar.kind == "lark" else f"start: {lark_rule(grammar)}"
    return rules + _NO_FORCING


def _shortened(message: str) -> str:
    lines = [line for line in message.splitlines() if not re.match(r"\s*(\d+ \||\^|<)", line)]  # not the grammar itself
    text = " ".join(" ".join(lines).split())
    if text.startswith("NoExtensionBias"):
        text = "there is no answer that it allows"
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[: _MAX_MESSAGE_CHARS - 3] + "..."
