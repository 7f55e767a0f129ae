"""One request's answer, streamed or whole: what differs between chat and completions, in two classes of one shape.

`pieces` and `ends` make the choices of chunks, `whole` those of a body.
"""

from __future__ import annotations

from typing import Any, Protocol

from dist_infer.openai.answers import CompletionLogprobs, chat_logprobs, finish_reason, joined, prompt_logprobs
from dist_infer.openai.service import Engine
from dist_infer.openai.translate import Ask
from dist_infer.openai.types import ChatRequest, CompletionRequest
from dist_infer.outputs import RequestOutput, TokenEvent


class Answering(Protocol):
    """Choices of one request. `prompt` counts its prompts."""

    chunk_object: str
    body_object: str
    id_prefix: str

    def openings(self, prompt: int, output: RequestOutput | None) -> list[dict[str, Any]]:
        """What comes before a prompt's first tokens. output: there when the request is not streamed."""
        ...

    def piece(self, prompt: int, event: TokenEvent) -> dict[str, Any] | None: ...

    def ends(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]: ...

    def whole(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]: ...

    def num_output_tokens(self, output: RequestOutput) -> int: ...


class ChatAnswering:
    """POST /v1/chat/completions"""

    chunk_object, body_object, id_prefix = "chat.completion.chunk", "chat.completion", "chatcmpl"

    def __init__(self, request: ChatRequest, ask: Ask) -> None:
        self._request = request
        self._n = ask.params.n
        self._num_top = request.top_logprobs or 0

    def openings(self, prompt: int, output: RequestOutput | None) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for index in range(self._n)]

    def piece(self, prompt: int, event: TokenEvent) -> dict[str, Any] | None:
        if not event.text and not event.logprobs:
            return None
        logprobs = None if event.logprobs is None else chat_logprobs(event.logprobs, self._num_top)
        return {"index": event.index, "delta": {"content": event.text}, "logprobs": logprobs, "finish_reason": None}

    def ends(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        return [
            {
                "index": answer.index,
                "delta": {},
                "logprobs": None,
                "finish_reason": finish_reason(answer),
                "stop_reason": answer.stop_reason,
            }
            for answer in output.outputs
        ]

    def whole(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        return [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if answer.logprobs is None else chat_logprobs(answer.logprobs, self._num_top),
                "finish_reason": finish_reason(answer),
                "stop_reason": answer.stop_reason,
            }
            for answer in output.outputs
        ]

    def num_output_tokens(self, output: RequestOutput) -> int:
        return sum(len(answer.token_ids) for answer in output.outputs)


class CompletionAnswering:
    """POST /v1/completions: choice = prompt × n + answer."""

    chunk_object, body_object, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, request: CompletionRequest, ask: Ask, engine: Engine) -> None:
        self._request, self._ask, self._engine = request, ask, engine
        self._n = ask.params.n
        self._is_prompt_alone = request.max_tokens == 0
        num_top = request.logprobs or 0
        self._logprobs = [CompletionLogprobs(num_top) for _ in range(len(ask.prompts) * self._n)]

    @property
    def waits_for_prompt(self) -> bool:
        """The prompt's log-probabilities are known at the end: until then nothing can be streamed."""
        return bool(self._request.echo) and self._request.logprobs is not None

    def openings(self, prompt: int, output: RequestOutput | None) -> list[dict[str, Any]]:
        if not self._request.echo or (output is None and self.waits_for_prompt):
            return []
        text, ids = self._ask.prompts[prompt]
        shown = self._engine.decode(ids) if text is None else text
        choices = []
        for index in range(prompt * self._n, (prompt + 1) * self._n):
            logprobs = None
            if self.waits_for_prompt and output is not None:
                logprobs = self._logprobs[index].add_prompt(ids, output.prompt_logprobs, self._engine.decode)
            choices.append({"index": index, "text": shown, "logprobs": logprobs, "finish_reason": None})
        return choices

    def piece(self, prompt: int, event: TokenEvent) -> dict[str, Any] | None:
        if self._is_prompt_alone or self.waits_for_prompt or not (event.text or event.logprobs):
            return None
        index = prompt * self._n + event.index
        logprobs = None if event.logprobs is None else self._logprobs[index].add(event.logprobs)
        return {"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": None}

    def ends(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        if self.waits_for_prompt:
            return self.whole(prompt, output)
        return [
            {
                "index": prompt * self._n + answer.index,
                "text": "",
                "logprobs": None,
                "finish_reason": "length" if self._is_prompt_alone else finish_reason(answer),
                "stop_reason": None if self._is_prompt_alone else answer.stop_reason,
            }
            for answer in output.outputs
        ]

    def whole(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        openings = {choice["index"]: choice for choice in self.openings(prompt, output)}
        choices = []
        for answer in output.outputs:
            index = prompt * self._n + answer.index
            texts, logprobs = [], []
            if (opening := openings.get(index)) is not None:
                texts.append(opening["text"])
                logprobs += [opening["logprobs"]] if opening["logprobs"] is not None else []
            reason = "length" if self._is_prompt_alone else finish_reason(answer)
            if not self._is_prompt_alone:
                texts.append(answer.text)
                if answer.logprobs is not None:
                    logprobs.append(self._logprobs[index].add(answer.logprobs))
            choice = {
                "index": index,
                "text": "".join(texts),
                "logprobs": joined(logprobs) if logprobs else None,
                "finish_reason": reason,
                "stop_reason": None if self._is_prompt_alone else answer.stop_reason,
            }
            if self._request.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(output)
            choices.append(choice)
        return choices

    def num_output_tokens(self, output: RequestOutput) -> int:
        return 0 if self._is_prompt_alone else sum(len(answer.token_ids) for answer in output.outputs)
