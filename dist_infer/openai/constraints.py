"""What a request says that its whole answer must be: the one field that says it, and the grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dist_infer.grammar import Grammar
from dist_infer.openai.errors import bad_request
from dist_infer.openai.tools import FieldError, GrammarText, check_schema, response_grammar
from dist_infer.openai.types import ChatRequest, Sampled
from partition.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """`field` is its place in the request, for messages."""

    field: str
    grammar: Grammar


def read_constraint(request: Sampled) -> Constraint | None:
    """Raises FieldError for what cannot be one, ApiError 400 for two of them."""
    given = list(_given(request))
    if len(given) > 1:
        raise both_constrain(given[0][0], given[1][0])
    for field, make in given:
        grammar = made(field, make)
        return None if grammar is None else Constraint(field=field, grammar=grammar)
    return None


def both_constrain(first: str, second: str) -> Exception:
    """ApiError 400."""
    return bad_request(
        f"`{first}` and `{second}` both say what the answer must be: give one of them",
        param=second,
        code="invalid_value",
    )


def made(field: str, make: Callable[[], Grammar | None]) -> Grammar | None:
    """FieldError instead of an error that does not name the field."""
    try:
        return make()
    except FieldError:
        raise
    except ConfigError as error:
        raise FieldError(field, str(error).removeprefix("grammar: ")) from None


def as_grammar(text: GrammarText) -> Grammar:
    return Grammar(kind=text.kind, text=text.text)


def _given(request: Sampled) -> Iterator[tuple[str, Callable[[], Grammar | None]]]:
    """All fields that are there, in the order in which they are named."""
    if isinstance(request, ChatRequest) and request.response_format not in (None, {"type": "text"}):
        yield "response_format", lambda: _of_response_format(request.response_format)
    # both ways to say it
    outputs = request.structured_outputs
    pairs: list[tuple[str, Any, Callable[[str, Any], Grammar]]] = [
        ("guided_json", request.guided_json, _of_schema),
        ("guided_regex", request.guided_regex, lambda _, value: Grammar.regex(value)),
        ("guided_choice", request.guided_choice, lambda _, value: Grammar.choice(value)),
        ("guided_grammar", request.guided_grammar, lambda _, value: Grammar.lark(value)),
    ]
    if outputs is not None:
        pairs += [
            ("structured_outputs.json", outputs.json_, _of_schema),
            ("structured_outputs.json_object", outputs.json_object, lambda _, value: Grammar.json_object()),
            ("structured_outputs.regex", outputs.regex, lambda _, value: Grammar.regex(value)),
            ("structured_outputs.choice", outputs.choice, lambda _, value: Grammar.choice(value)),
            ("structured_outputs.grammar", outputs.grammar, lambda _, value: Grammar.lark(value)),
        ]
        if all(value is None for field, value, _ in pairs if field.startswith("structured_outputs")):
            raise FieldError("structured_outputs", "says nothing: give json, json_object, regex, choice or grammar")
    for field, value, make in pairs:
        if value is not None:
            yield field, lambda field=field, value=value, make=make: make(field, value)  # type: ignore[misc]


def _of_response_format(given: object) -> Grammar | None:
    text = response_grammar(given)
    return None if text is None else as_grammar(text)


def _of_schema(field: str, given: Any) -> Grammar:
    schema = given
    if isinstance(given, str):
        try:
            schema = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise FieldError(field, f"is no JSON: {str(error)[:100]}") from None
    return Grammar.json_schema(check_schema(field, schema))
