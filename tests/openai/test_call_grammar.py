"""Grammars of calls and of response formats: what they let through is read back as calls, and fits the schemas."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import llguidance
import pytest

from dist_infer.grammar import Grammar
from dist_infer.openai.tools import (
    FORMATS,
    AnswerParser,
    FieldError,
    GrammarText,
    Reasoning,
    ToolChoice,
    call_grammar,
    detect_format,
    detect_reasoning,
    find_format,
    parse_answer,
    read_choice,
    read_tools,
    response_grammar,
)
from dist_infer.openai.tools.deepseek import CALL_BEGIN, SEP
from partition.errors import ConfigError

SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
RAW: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "stop"}},
]
TOOLS = read_tools(RAW)
REQUIRED, AUTO, NAMED = ToolChoice(mode="required"), ToolChoice(mode="auto"), ToolChoice(mode="named", name="weather")
BYTES = llguidance.LLTokenizer("byte")
FIRST_SPECIAL_ID = 256


def matcher(grammar: GrammarText | None) -> llguidance.LLMatcher:
    assert grammar is not None
    assert Grammar(kind=grammar.kind, text=grammar.text)  # the engine takes it
    compiled = llguidance.LLMatcher.grammar_from_lark(grammar.text)
    assert llguidance.LLMatcher.validate_grammar(compiled, BYTES) == ""
    return llguidance.LLMatcher(BYTES, compiled)


def takes(grammar: GrammarText | None, text: str, special: dict[str, int] | None = None) -> bool:
    """Whether the whole text is an answer that the grammar allows to end there."""
    tokens: list[int] = []
    while text:
        found = next((name for name in special or () if text.startswith(name)), None)
        tokens += [special[found]] if special and found else list(text[0].encode())
        text = text[len(found or text[0]) :]
    state = matcher(grammar)
    return state.try_consume_tokens(tokens) == len(tokens) and state.is_accepting()


def drawn(grammar: GrammarText | None, seed: int) -> str:
    """A random text that the grammar allows."""
    random_, state, found = random.Random(seed), matcher(grammar), bytearray()
    while not state.is_stopped() and len(found) < 4000:
        bits = int.from_bytes(state.compute_bitmask(), "little")
        allowed = [token for token in range(BYTES.vocab_size) if bits >> token & 1]
        token = BYTES.eos_token if BYTES.eos_token in allowed else random_.choice(allowed)
        state.consume_token(token)
        if token < FIRST_SPECIAL_ID:
            found.append(token)
    return found.decode()


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", [REQUIRED, NAMED], ids=["required", "named"])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_forced_answers_are_calls(format: str, choice: ToolChoice, parallel: bool) -> None:
    """Rule: whatever a model does under the grammar, the parser finds calls that fit, and nothing else."""
    tools = (
        TOOLS[:1]
        if choice is NAMED
        else read_tools([RAW[0], {**RAW[0], "function": {**RAW[0]["function"], "name": "other"}}])
    )
    grammar = call_grammar(tools, choice, FORMATS[format], parallel)
    for seed in range(4):
        answer = parse_answer(AnswerParser(FORMATS[format], [tool.name for tool in tools]), drawn(grammar, seed))
        assert answer.content is None
        assert answer.calls
        assert parallel or len(answer.calls) == 1
        for call in answer.calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMA)


@pytest.mark.parametrize("is_special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_strict_functions_in_auto(format: str, is_special: bool) -> None:
    """Rule: with auto any text may come, and a call of a strict function fits its schema."""
    markers = FORMATS[format].markers if is_special and format != "llama3" else ()
    special = {marker: FIRST_SPECIAL_ID + index for index, marker in enumerate(markers)}
    auto = call_grammar(TOOLS, AUTO, FORMATS[format], True, special_token_ids=special)
    forced = call_grammar(TOOLS, NAMED, FORMATS[format], False)
    good = drawn(forced, 1)
    assert takes(auto, "It is warm.", special)
    assert takes(auto, good, special)
    assert takes(auto, good if format == "llama3" else f"Let me see. {good}", special)
    assert not takes(auto, good.replace('"unit"', '"place"'), special)
    assert not takes(forced, "It is warm.")


def test_parallel_calls_are_bounded() -> None:
    """A weak model repeats itself until max_tokens; sixteen calls are enough."""
    grammar = call_grammar(TOOLS, REQUIRED, FORMATS["hermes"], True)
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    assert takes(grammar, "\n".join([call] * 16))
    assert not takes(grammar, "\n".join([call] * 17))


@pytest.mark.parametrize("is_special", [True, False], ids=["special", "text"])
def test_a_thought_comes_before_a_forced_call(is_special: bool) -> None:
    """Guards reasoning models against a grammar that forbids them to think."""
    special = {"<think>": 256, "</think>": 257} if is_special else {}
    call = '{"name": "stop", "parameters": {}}'
    for started in (True, False):
        grammar = call_grammar(
            TOOLS,
            REQUIRED,
            FORMATS["llama3"],
            True,
            special_token_ids=special,
            reasoning=Reasoning(has_started=started),
        )
        thought = ("" if started else "<think>") + 'so {"a": 1} <b>\n</think>\n\n'
        assert takes(grammar, thought + call, special)
        assert not takes(grammar, thought + "no", special)
        assert takes(grammar, call, special) is (not started)


def test_what_needs_no_grammar() -> None:
    """none, and auto without a strict function, leave the answer alone."""
    assert call_grammar(TOOLS, ToolChoice(mode="none"), FORMATS["hermes"], True) is None
    assert call_grammar(TOOLS[1:], AUTO, FORMATS["hermes"], True) is None


def test_too_many_tools_are_refused_by_name() -> None:
    """The bound of the engine's grammars is told in terms of the request."""
    big = {"type": "object", "description": "x" * 60_000}
    tools = read_tools([{"type": "function", "function": {"name": f"f{i}", "parameters": big}} for i in range(2)])
    with pytest.raises(FieldError, match=r"^tools make a grammar"):
        call_grammar(tools, REQUIRED, FORMATS["hermes"], True)


def response(**schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def not_strict(strict: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": strict, "schema": {}}}


def test_response_formats() -> None:
    """Each kind is the grammar it says, and text is none."""
    assert response_grammar(None) is None
    assert response_grammar({"type": "text"}) is None
    assert response_grammar({"type": "json_object"}) == ("json_object", "")
    assert response_grammar(response(**SCHEMA)) == ("json_schema", json.dumps(SCHEMA))


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "yaml"}, "response_format.type"),
        ({"type": ["json_object"]}, "response_format.type"),
        ({"type": "json_object", "schema": {}}, "response_format.schema"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
        (not_strict(1), "response_format.json_schema.strict"),
        (response(properties={"a": {"not": {}}}), "response_format.json_schema.schema.properties.a.not"),
        (response(items={"format": "iri"}), "response_format.json_schema.schema.items.format"),
        (response(anyOf=[{}, {"nullable": True}]), "response_format.json_schema.schema.anyOf[1].nullable"),
        (response(**{"x-guidance": {"lenient": True}}), "response_format.json_schema.schema.x-guidance"),
        (response(**{"$ref": "http://127.0.0.1/x"}), "response_format.json_schema.schema.$ref"),
        (response(type="text"), "response_format.json_schema.schema.type"),
        (response(enum=[]), "response_format.json_schema.schema.enum"),
        (response(properties=[]), "response_format.json_schema.schema.properties"),
        (response(description="x" * 70_000), "response_format.json_schema.schema"),
        (response(description="\ud800"), "response_format.json_schema.schema"),
        (response(const=float("nan")), "response_format.json_schema.schema"),
    ],
)  # fmt: skip
def test_bad_response_formats_name_the_place(given: object, param: str) -> None:
    """Rule: a keyword that would not be kept, or a wrong shape, is refused with its place."""
    with pytest.raises(FieldError) as caught:
        response_grammar(given)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


def test_deep_schemas_are_refused() -> None:
    """Nesting is what a client can multiply for nothing."""
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(FieldError):
        response_grammar(response(**deep))


def function(parameters: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "a", "parameters": parameters}}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ("x", "tools"),
        ([{}] * 129, "tools"),
        (["x"], "tools[0]"),
        ([{"type": "web_search"}], "tools[0]"),
        ([RAW[0], {**RAW[1], "id": 1}], "tools[1].id"),
        ([RAW[0], RAW[0]], "tools[1].function.name"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "a", "args": {}}}], "tools[0].function.args"),
        ([{"type": "function", "function": {"name": "a", "strict": "yes"}}], "tools[0].function.strict"),
        ([{"type": "function", "function": {"name": "a", "description": 1}}], "tools[0].function.description"),
        ([function(1)], "tools[0].function.parameters"),
        ([function({"type": "array"})], "tools[0].function.parameters.type"),
        ([function({"if": {}})], "tools[0].function.parameters.if"),
    ],
)  # fmt: skip
def test_bad_tools_name_the_place(tools: object, param: str) -> None:
    """Rule: every accepted field works or is refused by its place."""
    with pytest.raises(FieldError) as caught:
        read_tools(tools)
    assert caught.value.param == param


def test_choices() -> None:
    """Left out is auto with tools and none without; a name must be one of the tools."""
    assert read_choice(None, TOOLS) == read_choice("auto", TOOLS) == AUTO
    assert read_choice(None, ()) == read_choice("auto", ()) == ToolChoice(mode="none")
    assert read_choice("required", TOOLS) == REQUIRED
    assert read_choice({"type": "function", "function": {"name": "weather"}}, TOOLS) == NAMED
    bad = ("any", 1, {}, {"type": "function"}, {"type": "function", "function": {"name": "rm"}}, ["auto"])
    for choice in bad:
        with pytest.raises(FieldError, match=r"^tool_choice"):
            read_choice(choice, TOOLS)
    with pytest.raises(FieldError, match="no tools"):
        read_choice("required", ())


@pytest.mark.parametrize(
    ("template", "model_type", "name"),
    [
        ("{% if tools %}<tool_call>", "llama", "hermes"),  # a fine-tune: the template says more than the type
        ("{% if tools %}<tool_call><function=", "qwen3_moe", None),
        ("<|start_header_id|> {% if tools %}<|python_tag|>", "llama", "llama3"),
        ("""<|header_start|> {'{"name": "f", "parameters": '}""", "llama4_text", "llama3"),
        ("[TOOL_CALLS] [AVAILABLE_TOOLS]", "mistral", "mistral"),
        ("[TOOL_CALLS] [ARGS]", "mistral3", "mistral-args"),
        (f"{CALL_BEGIN}{SEP}```json", "deepseek_v3", "deepseek-v3"),
        (f"{CALL_BEGIN}{SEP}", "deepseek_v3", "deepseek-v31"),
        ("{% if tools %}", "qwen2", "hermes"),
        ("{{ messages }}", "qwen2", None),
        ("{% if tools %}", "gpt2", None),
    ],
)
def test_formats_are_detected(template: str, model_type: str, name: str | None) -> None:
    """Guards against a parser that waits for markers which the model was not taught."""
    found = detect_format(template, model_type)
    assert (found.name if found else None) == name


def test_detected_thoughts() -> None:
    """A prompt that ends in an open thought starts in it; one that ends with a closed one has no thought."""
    assert detect_reasoning("... </think>", "<|assistant|>") == Reasoning()
    assert detect_reasoning("", "<|assistant|><think>\n") == Reasoning(has_started=True)
    assert detect_reasoning("... </think>", "<|assistant|><think>\n\n</think>\n\n") is None
    assert detect_reasoning("{{ messages }}", "<|assistant|>") is None


def test_formats_say_what_they_need_of_the_detokenizer() -> None:
    """A marker that is skipped as a special token can never be found."""
    assert FORMATS["mistral"].must_keep_special({"[TOOL_CALLS]", "</s>"})
    assert not FORMATS["hermes"].must_keep_special({"<|im_end|>"})
    with pytest.raises(ConfigError, match="did you mean hermes"):
        find_format("hermess")
