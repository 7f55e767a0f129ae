"""One request's answer, streamed or whole: what differs between chat and completions, in two classes of one shape.

`pieces` and `ends` make the choices of chunks, `whole` those of a body.
"""

from __future__ import annotations

from typing import Any, Protocol

from dist_infer.openai.answers import CompletionLogprobs, chat_logprobs, finish_reason, joined, prompt_logprobs
from dist_infer.openai.read_answer import ReadAnswer
from dist_infer.openai.service import Engine
from dist_infer.openai.translate import Ask
from dist_infer.openai.types import ChatRequest, CompletionRequest
from dist_infer.outputs import CompletionOutput, RequestOutput, TokenEvent


class Answering(Protocol):
    """Choices of one request. `prompt` counts its prompts."""

    chunk_object: str
    body_object: str
    id_prefix: str

    def openings(self, prompt: int, output: RequestOutput | None) -> list[dict[str, Any]]:
        """What comes before a prompt's first tokens. output: there when the request is not streamed."""
        ...

    def note(self, prompt: int, event: TokenEvent) -> None:
        """Instead of `pieces`, for a request that is not streamed."""
        ...

    def pieces(self, prompt: int, event: TokenEvent) -> list[dict[str, Any]]: ...

    def is_enough(self, prompt: int) -> bool:
        """No more is wanted of this prompt."""
        ...

    def ends(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]: ...

    def whole(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]: ...

    def num_output_tokens(self, output: RequestOutput) -> int: ...


class ChatAnswering:
    """POST /v1/chat/completions"""

    chunk_object, body_object, id_prefix = "chat.completion.chunk", "chat.completion", "chatcmpl"

    def __init__(self, request: ChatRequest, ask: Ask) -> None:
        self._num_top = request.top_logprobs or 0
        shows = request.include_reasoning is not False
        reading = ask.reading
        self._answers = [
            ReadAnswer(None, shows_thought=shows)
            if reading is None
            else ReadAnswer(reading.parser(), shows_thought=shows, is_forced=reading.is_forced)
            for _ in range(ask.params.n)
        ]

    def openings(self, prompt: int, output: RequestOutput | None) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [_chat_chunk(index, delta, None) for index in range(len(self._answers))]

    def note(self, prompt: int, event: TokenEvent) -> None:
        self._answers[event.index].push(event)

    def pieces(self, prompt: int, event: TokenEvent) -> list[dict[str, Any]]:
        answer = self._answers[event.index]
        if answer.is_enough:
            return []
        deltas = answer.push(event)
        logprobs = None if event.logprobs is None else chat_logprobs(event.logprobs, self._num_top)
        if not deltas and event.logprobs:  # of tokens whose text is held back
            deltas = [{"content": ""}]
        # all of an event's go with its first delta: which token made which is not known
        return [_chat_chunk(event.index, delta, None if at else logprobs) for at, delta in enumerate(deltas)]

    def is_enough(self, prompt: int) -> bool:
        return all(answer.is_enough for answer in self._answers)

    def ends(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        found = []
        for answer in output.outputs:
            found += [_chat_chunk(answer.index, delta, None) for delta in self._answers[answer.index].end()]
            found.append({**_chat_chunk(answer.index, {}, None), **self._ending(answer)})
        return found

    def whole(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        found = []
        for answer in output.outputs:
            read = self._answers[answer.index]
            read.end()
            entries = answer.logprobs
            if entries is not None and read.is_enough:
                entries = entries[: read.num_tokens]
            found.append(
                {
                    "index": answer.index,
                    "message": read.message(),
                    "logprobs": None if entries is None else chat_logprobs(entries, self._num_top),
                    **self._ending(answer),
                }
            )
        return found

    def num_output_tokens(self, output: RequestOutput) -> int:
        """Up to where no more was wanted: how far the engine came until it heard of it is chance."""
        reads = [(answer, self._answers[answer.index]) for answer in output.outputs]
        return sum(read.num_tokens if read.is_enough else len(answer.token_ids) for answer, read in reads)

    def _ending(self, answer: CompletionOutput) -> dict[str, Any]:
        read = self._answers[answer.index]
        reason = "stop" if read.is_enough else finish_reason(answer)
        if reason == "stop" and read.has_calls:
            reason = "tool_calls"
        return {"finish_reason": reason, "stop_reason": None if read.is_enough else answer.stop_reason}


def _chat_chunk(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


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

    def note(self, prompt: int, event: TokenEvent) -> None:
        pass  # the output has it all

    def is_enough(self, prompt: int) -> bool:
        return False

    def pieces(self, prompt: int, event: TokenEvent) -> list[dict[str, Any]]:
        if self._is_prompt_alone or self.waits_for_prompt or not (event.text or event.logprobs):
            return []
        index = prompt * self._n + event.index
        logprobs = None if event.logprobs is None else self._logprobs[index].add(event.logprobs)
        return [{"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": None}]

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
