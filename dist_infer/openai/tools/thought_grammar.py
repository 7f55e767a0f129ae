"""The thought before a constrained answer: free text up to the closing tag, then what the constraint allows."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dist_infer.grammar import Grammar
from dist_infer.grammar_matcher import lark_rule
from dist_infer.openai.tools.reasoning import Reasoning


def behind_thought(grammar: Grammar, tags: Reasoning, special_token_ids: Mapping[str, int]) -> Grammar:
    """The same constraint on what follows the thought. A Lark grammar is the whole answer: it stays as it is."""
    if grammar.kind == "lark":
        return grammar
    thought, rules = thought_rules(tags, special_token_ids)
    return Grammar.lark("\n".join([f"start: {thought} answer", f"answer: {lark_rule(grammar)}", *rules, ""]))


def thought_rules(tags: Reasoning, special_token_ids: Mapping[str, int]) -> tuple[str, list[str]]:
    """What stands for the thought in a Lark rule, and the rules that it needs.

    A thought that the prompt has begun must be ended; another one may be left out.
    """
    begin = "" if tags.has_started else f"({marker(tags.open, special_token_ids)}) "
    if tags.close in special_token_ids:
        rules = ["thought: /(?s:.*)/"]
        whole = f"{begin}thought {marker(tags.close, special_token_ids)}"
    else:
        rules = [f"thought[suffix={marker(tags.close, {})}]: /(?s:.*)/"]
        whole = f"{begin}thought"
    rules.append(r"gap: /[\r\n]{0,4}/")
    return (f"{whole} gap" if tags.has_started else f"({whole} gap)?"), rules


def marker(text: str, special_token_ids: Mapping[str, int]) -> str:
    """A text in a Lark rule: a special token by its id, which no other token can spell, else as a string."""
    known = special_token_ids.get(text)
    return json.dumps(text, ensure_ascii=False) if known is None else f"<[{known}]>"
