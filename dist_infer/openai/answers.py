"""Outputs of the engine in OpenAI's shapes: choices, log-probabilities, usage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dist_infer.openai.errors import unavailable
from dist_infer.outputs import CompletionOutput, RequestOutput, TokenLogprobs

_LEAST_LOGPROB = -9999.0  # JSON has no infinity
_LOST = "\ufffd"


def finish_reason(output: CompletionOutput) -> str:
    """ApiError 503 for an answer that the server broke off."""
    if output.finish_reason in ("stop", "length"):
        return str(output.finish_reason)
    raise unavailable("the server is shutting down and has broken off this answer", "draining", 5)


def usage(num_prompt_tokens: int, num_output_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }


def chat_logprobs(entries: Sequence[TokenLogprobs], num_top: int) -> dict[str, Any]:
    """One entry of `content` for each token."""
    content = []
    for entry in entries:
        chosen = next(iter(entry.values()))
        ranked = sorted(entry.values(), key=lambda item: -item.logprob)[:num_top] if num_top else []
        content.append({**_token(chosen), "top_logprobs": [_token(item) for item in ranked]})
    return {"content": content, "refusal": None}


def _token(item: Any) -> dict[str, Any]:
    text = item.decoded_token
    data = None if _LOST in text else list(text.encode())  # a part of a character is no text
    return {"token": text, "logprob": number(item.logprob), "bytes": data}


def number(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


class CompletionLogprobs:
    """The older shape: four lists of the same length. `offset` is that of the next token in the choice's text."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self.offset = 0

    def add(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Of the next tokens alone."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            chosen = next(iter(entry.values()))
            top = sorted(entry.values(), key=lambda item: -item.logprob)[: self._num_top]
            self._append(found, chosen.decoded_token, number(chosen.logprob), self._by_text(top))
        return found

    def add_prompt(
        self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None] | None, decode: Callable[[Sequence[int]], str]
    ) -> dict[str, Any]:
        """Of an echoed prompt: its first token has no log-probability."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(ids, entries or [None] * len(ids), strict=True):
            if entry is None:
                self._append(found, decode([token]), None, None)
            else:
                top = sorted(entry.values(), key=lambda item: -item.logprob)[: self._num_top]
                self._append(found, entry[token].decoded_token, number(entry[token].logprob), self._by_text(top))
        return found

    def _by_text(self, top: Sequence[Any]) -> dict[str, float] | None:
        """Two tokens may have one text: the likelier one is shown."""
        found: dict[str, float] = {}
        for item in top:
            found.setdefault(item.decoded_token, number(item.logprob))
        return found if self._num_top else None

    def _append(self, found: dict[str, Any], text: str, logprob: float | None, top: dict[str, float] | None) -> None:
        found["tokens"].append(text)
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(top)
        found["text_offset"].append(self.offset)
        self.offset += len(text)


def prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None]:
    """By token id, as text: {logprob, decoded_token}; None for the first token."""
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": number(item.logprob), "decoded_token": item.decoded_token}
            for token, item in entry.items()
        }
        for entry in output.prompt_logprobs or []
    ]


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several of `CompletionLogprobs`' answers as one."""
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}
