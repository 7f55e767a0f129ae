"""Tool calls, reasoning and response formats: what a model's text means, and grammars for what it may be. No engine.

The surface that the endpoint uses; parsers never raise for what a model wrote, checks raise FieldError.
"""

from dist_infer.openai.tools.answer import ParsedAnswer, ToolCall, parse_answer
from dist_infer.openai.tools.call_grammar import call_grammar
from dist_infer.openai.tools.deltas import BrokenCall, ContentDelta, Delta, Flushed, ReasoningDelta, ToolCallDelta
from dist_infer.openai.tools.errors import FieldError
from dist_infer.openai.tools.formats import FORMATS, AnswerParser, ToolFormat, detect_format, find_format
from dist_infer.openai.tools.parser import ToolParser
from dist_infer.openai.tools.reasoning import Reasoning, detect_reasoning
from dist_infer.openai.tools.requested import Tool, ToolChoice, read_choice, read_tools
from dist_infer.openai.tools.response_format import GrammarText, response_grammar

__all__ = [
    "FORMATS",
    "AnswerParser",
    "BrokenCall",
    "ContentDelta",
    "Delta",
    "FieldError",
    "Flushed",
    "GrammarText",
    "ParsedAnswer",
    "Reasoning",
    "ReasoningDelta",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "ToolFormat",
    "ToolParser",
    "call_grammar",
    "detect_format",
    "detect_reasoning",
    "find_format",
    "parse_answer",
    "read_choice",
    "read_tools",
    "response_grammar",
]
