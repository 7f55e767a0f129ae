"""Tool calls, reasoning and response formats: what a model's text means, and grammars for what it may be. No engine.

The surface that the endpoint uses; parsers never raise for what a model wrote, checks raise FieldError.
"""

from dist_infer.openai.tools.answer import ParsedAnswer, ToolCall, join_deltas, parse_answer
from dist_infer.openai.tools.call_grammar import call_grammar
from dist_infer.openai.tools.deltas import BrokenCall, ContentDelta, Delta, Flushed, ReasoningDelta, ToolCallDelta
from dist_infer.openai.tools.errors import FieldError
from dist_infer.openai.tools.formats import FORMATS, AnswerParser, FormatName, ToolFormat, detect_format, find_format
from dist_infer.openai.tools.parser import ToolParser
from dist_infer.openai.tools.reasoning import Reasoning, ReasoningName, detect_reasoning
from dist_infer.openai.tools.requested import Tool, ToolChoice, read_choice, read_tools
from dist_infer.openai.tools.response_format import GrammarText, response_grammar
from dist_infer.openai.tools.schema_check import check_schema
from dist_infer.openai.tools.thought_grammar import behind_thought

__all__ = [
    "FORMATS",
    "AnswerParser",
    "BrokenCall",
    "ContentDelta",
    "Delta",
    "FieldError",
    "Flushed",
    "FormatName",
    "GrammarText",
    "ParsedAnswer",
    "Reasoning",
    "ReasoningDelta",
    "ReasoningName",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "ToolFormat",
    "ToolParser",
    "behind_thought",
    "call_grammar",
    "check_schema",
    "detect_format",
    "detect_reasoning",
    "find_format",
    "join_deltas",
    "parse_answer",
    "read_choice",
    "read_tools",
    "response_grammar",
]
