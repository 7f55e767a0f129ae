"""The formats by name: their parsers, what they need of the detokenizer, and which of them a model writes."""

from __future__ import annotations

import difflib
import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dist_infer.openai.tools import deepseek, hermes, llama3, mistral
from dist_infer.openai.tools.deltas import Delta, Flushed
from dist_infer.openai.tools.machine import CallMachine, NoCalls
from dist_infer.openai.tools.reasoning import Reasoning, ThoughtSplitter
from dist_infer.openai.tools.sink import Sink
from partition.errors import ConfigError

FormatName: TypeAlias = Literal["hermes", "llama3", "mistral", "mistral-args", "deepseek-v3", "deepseek-v31"]

_SHORT_ID_CHARS = string.ascii_letters + string.digits


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Mistral's templates take ids of nine letters and digits, and no others."""
    return "".join(secrets.choice(_SHORT_ID_CHARS) for _ in range(9))


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family of models writes calls.

    markers: the texts that the parser looks for. keeps_special_tokens: whether published tokenizers hold some of them
    as special tokens, so that the text must be decoded with skip_special_tokens=False; `must_keep_special` knows it
    for a given tokenizer.
    """

    name: FormatName
    machine: type[CallMachine]
    markers: tuple[str, ...]
    keeps_special_tokens: bool
    new_id: Callable[[], str] = _long_id

    def must_keep_special(self, special_tokens: Collection[str]) -> bool:
        """Whether a marker would be lost by skipping this tokenizer's special tokens."""
        return any(marker in special_tokens for marker in self.markers)


_DEEPSEEK = (deepseek.CALLS_BEGIN, deepseek.CALL_BEGIN, deepseek.SEP, deepseek.CALL_END, deepseek.CALLS_END)
FORMATS: dict[str, ToolFormat] = {
    each.name: each
    for each in (
        ToolFormat(
            name="hermes",
            machine=hermes.HermesCalls,
            markers=(hermes.OPEN, hermes.CLOSE),
            keeps_special_tokens=False,
        ),
        ToolFormat(name="llama3", machine=llama3.Llama3Calls, markers=(llama3.TAG,), keeps_special_tokens=True),
        ToolFormat(
            name="mistral",
            machine=mistral.MistralCalls,
            markers=(mistral.TAG,),
            keeps_special_tokens=True,
            new_id=_short_id,
        ),
        ToolFormat(
            name="mistral-args",
            machine=mistral.MistralCalls,
            markers=(mistral.TAG, mistral.ARGS, mistral.CALL_ID),
            keeps_special_tokens=True,
            new_id=_short_id,
        ),
        ToolFormat(name="deepseek-v3", machine=deepseek.DeepSeekCalls, markers=_DEEPSEEK, keeps_special_tokens=True),
        ToolFormat(name="deepseek-v31", machine=deepseek.DeepSeekCalls, markers=_DEEPSEEK, keeps_special_tokens=True),
    )
}

_LLAMA_HEADERS = ("<|start_header_id|>", "<|header_start|>")  # Llama 3 and 4
_BY_MODEL_TYPE = {
    "qwen2": "hermes",
    "qwen2_moe": "hermes",
    "qwen3": "hermes",
    "qwen3_moe": "hermes",
    "llama": "llama3",
    "llama4_text": "llama3",
    "mistral": "mistral",
    "mixtral": "mistral",
    "ministral": "mistral-args",
    "mistral3": "mistral-args",
    "deepseek_v3": "deepseek-v3",
}


def find_format(name: str) -> ToolFormat:
    """Raises ConfigError with the names there are."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else "choose one of them"
        raise ConfigError(f"no tool call format {name!r}; there are {', '.join(FORMATS)}: {hint}")
    return FORMATS[name]


def detect_format(template: str, model_type: str | None = None) -> ToolFormat | None:
    """The format that a chat template teaches its model; None for a template without tools, or with a way of its own.

    What the template says goes first: a fine-tune keeps its base's model_type and brings another template. The
    model_type decides only where the template names tools and no marker.
    """
    if "<function=" in template or "tool_code" in template:
        return None  # calls in XML or in Python, which no parser here reads
    if deepseek.SEP in template:
        return FORMATS["deepseek-v3" if deepseek.FENCE in template else "deepseek-v31"]
    if mistral.TAG in template:
        return FORMATS["mistral-args" if mistral.ARGS in template else "mistral"]
    if hermes.OPEN in template:
        return FORMATS["hermes"]
    if llama3.TAG in template or ('"parameters": ' in template and any(each in template for each in _LLAMA_HEADERS)):
        return FORMATS["llama3"]
    known = _BY_MODEL_TYPE.get(model_type or "")
    return FORMATS[known] if known is not None and "tools" in template else None


class AnswerParser:
    """Reads one answer: the thought first, then content and calls. Implements ToolParser; owned by one request."""

    def __init__(
        self,
        format: ToolFormat | None,
        tools: Collection[str],
        *,
        parallel: bool = True,
        reasoning: Reasoning | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        """tools: the names that may be called: none, or no format, and nothing is a call.

        parallel: whether more than one call is wanted. new_id: ids of calls; the format's own way by default.
        """
        self._sink = Sink(new_id or (format.new_id if format else _long_id))
        machine = format.machine if format and tools else NoCalls
        self._machine = machine(self._sink, frozenset(tools), parallel=parallel)
        self._thought = ThoughtSplitter(self._sink, reasoning, self._machine.feed) if reasoning else None
        self._feed = self._thought.feed if self._thought else self._machine.feed
        self._is_over = False

    @property
    def wants_stop(self) -> bool:
        return self._machine.wants_stop

    def push(self, text: str) -> list[Delta]:
        if self._is_over:
            raise RuntimeError("text was pushed behind the end of an answer")
        for char in text:
            self._feed(char)
        return self._sink.take()

    def flush(self) -> Flushed:
        if self._is_over:
            raise RuntimeError("an answer was ended twice")
        self._is_over = True
        if self._thought:
            self._thought.end()
        self._machine.end()
        return self._sink.end(is_reasoning=self._thought is not None and self._thought.is_thinking)
