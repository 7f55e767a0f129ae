"""The call syntax of a format as a grammar, for answers that must be calls, and for strict functions.

It is llguidance's dialect of Lark. A marker that the tokenizer holds as a special token is written by its id: no other
token can spell it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dist_infer.grammar import MAX_GRAMMAR_BYTES
from dist_infer.openai.tools import deepseek, hermes, mistral
from dist_infer.openai.tools.errors import FieldError
from dist_infer.openai.tools.formats import ToolFormat
from dist_infer.openai.tools.reasoning import Reasoning
from dist_infer.openai.tools.requested import Tool, ToolChoice
from dist_infer.openai.tools.response_format import GrammarText
from dist_infer.openai.tools.thought_grammar import marker, thought_rules

MAX_CALLS = 16
# One space where Python's json.dumps puts one, and none elsewhere: free space is where a weak model never ends.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def call_grammar(
    tools: Sequence[Tool],
    choice: ToolChoice,
    format: ToolFormat,
    parallel: bool,
    *,
    special_token_ids: Mapping[str, int] | None = None,
    reasoning: Reasoning | None = None,
) -> GrammarText | None:
    """What an answer may be, or None when it may be anything.

    required, named: one call or (`parallel`) up to MAX_CALLS, and nothing else but the thought before them. auto with
    a strict function: any text, but what begins like a call is one.
    special_token_ids: of the tokenizer's special tokens, by their text. Raises FieldError when the tools are too large.
    """
    if choice.mode == "none" or not tools:
        return None
    if choice.mode == "auto" and not any(tool.strict for tool in tools):
        return None
    wanted = [tool for tool in tools if choice.mode != "named" or tool.name == choice.name]
    writer = _Writer(format, special_token_ids or {}, reasoning)
    text = writer.grammar(wanted, parallel=parallel, is_forced=choice.mode != "auto")
    if (num_bytes := len(text.encode())) > MAX_GRAMMAR_BYTES:
        raise FieldError("tools", f"make a grammar of {num_bytes} bytes, more than the {MAX_GRAMMAR_BYTES} allowed")
    return GrammarText("lark", text)


class _Writer:
    def __init__(self, format: ToolFormat, special: Mapping[str, int], reasoning: Reasoning | None) -> None:
        self._name = format.name
        self._special = special
        self._reasoning = reasoning
        self._rules: list[str] = []

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, is_forced: bool) -> str:
        for index, tool in enumerate(tools):
            # In auto only a strict function's arguments were promised to fit its schema.
            schema = tool.parameters if is_forced or tool.strict else {"type": "object"}
            self._rules.append(f"args_{index}: %json {_json({**schema, 'x-guidance': _SPACING})}")
        answer = self._calls(tools, parallel) if is_forced else self._optional(tools, parallel)
        start = answer
        if self._reasoning:
            thought, rules = thought_rules(self._reasoning, self._special)
            start = f"{thought} {answer}"
            self._rules += rules
        return "\n".join([f"start: {start}", *self._rules, ""])

    def _calls(self, tools: Sequence[Tool], parallel: bool, *, is_open: bool = False) -> str:
        """All of the calls. is_open: the first marker was written already; then only of a format with an outer one."""
        outer, begin, separator, end = self._frame()
        self._alternatives("call", tools, is_open=False)
        more = f"({separator} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
        return " ".join(part for part in ("" if is_open else outer, begin, "call", more, end) if part)

    def _alternatives(self, rule: str, tools: Sequence[Tool], *, is_open: bool) -> None:
        calls = [self._call(tool.name, index, is_open=is_open) for index, tool in enumerate(tools)]
        self._rules.append(f"{rule}: {' | '.join(calls)}")

    def _frame(self) -> tuple[str, str, str, str]:
        """The marker around all calls, what stands before the first, between two, and behind the last."""
        if self._name == "hermes":
            return "", "", _text("\n"), ""
        if self._name == "llama3":
            return "", "", _text("; "), ""
        if self._name == "mistral":
            return self._marker(mistral.TAG), _text("["), _text(", "), _text("]")
        if self._name == "mistral-args":
            return "", "", "", ""
        newline = _text("\n") if self._name == "deepseek-v3" else ""
        return self._marker(deepseek.CALLS_BEGIN), "", newline, self._marker(deepseek.CALLS_END)

    def _call(self, name: str, index: int, *, is_open: bool) -> str:
        args = f"args_{index}"
        key = "parameters" if self._name == "llama3" else "arguments"
        head, tail = _text(f'{{"name": "{name}", "{key}": '), _text("}")
        if self._name == "hermes":
            parts = [self._marker(hermes.OPEN), _text("\n"), head, args, tail, _text("\n"), self._marker(hermes.CLOSE)]
        elif self._name in ("llama3", "mistral"):
            parts = [head, args, tail]
        elif self._name == "mistral-args":
            parts = [self._marker(mistral.TAG), _text(name), self._marker(mistral.ARGS), args]
        else:
            begin, sep, end = (self._marker(each) for each in (deepseek.CALL_BEGIN, deepseek.SEP, deepseek.CALL_END))
            if self._name == "deepseek-v3":
                lines = _text(f"{name}\n{deepseek.FENCE}\n")
                parts = [begin, _text(deepseek.KIND), sep, lines, args, _text("\n```"), end]
            else:
                parts = [begin, _text(name), sep, args, end]
        return " ".join(parts[1:] if is_open else parts)

    def _optional(self, tools: Sequence[Tool], parallel: bool) -> str:
        """Any text, in which the format's first marker begins calls and nothing else."""
        if self._name == "llama3":  # its calls begin like nothing but a JSON object
            self._rules.append("free: /[^{](?s:.*)/")
            return f"(free | {self._calls(tools, parallel)})?"
        self._rules.append("text: /(?s:.*)/")
        first = _first_marker(self._name)
        if first in self._special:  # which no text can hold
            return f"text ({self._calls(tools, parallel)})?"
        # A lazy rule ends with the first marker, so `text` never gets to hold one.
        self._rules.append(f"head[suffix={_text(first)}]: /(?s:.*)/")
        if self._frame()[0]:
            return f"(head {self._calls(tools, parallel, is_open=True)})? text"
        self._alternatives("opened", tools, is_open=True)
        return f"(head opened){{0,{MAX_CALLS if parallel else 1}}} text"

    def _marker(self, text: str) -> str:
        return marker(text, self._special)


def _first_marker(name: str) -> str:
    if name == "hermes":
        return hermes.OPEN
    return mistral.TAG if name.startswith("mistral") else deepseek.CALLS_BEGIN


def _text(text: str) -> str:
    """A text as a Lark string, which is written like a JSON one."""
    return _json(text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
