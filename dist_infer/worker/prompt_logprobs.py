"""Log-probabilities of a prompt's own tokens: every row of the prompt goes through the head, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dist_infer.messages import Chunk, PromptLogprobs
from dist_infer.worker.request_table import RequestTable
from dist_infer.worker.sampler import likeliest, rows_at_once

Head = Callable[[torch.Tensor], torch.Tensor]  # rows [n] of the packed row -> logits [n, vocab]


@dataclass(frozen=True)
class PromptSpan:
    """Rows [first_row, first_row + len(token_ids)) of a micro-batch's packed row, each before one of the tokens.

    position: of the first of the tokens in the prompt. count: see SamplingSpec.num_prompt_logprobs.
    """

    request_id: str
    first_row: int
    position: int
    token_ids: list[int]
    count: int


def prompt_spans(chunks: Sequence[Chunk], table: RequestTable) -> list[PromptSpan]:
    """What a micro-batch computes of prompts whose log-probabilities are asked for."""
    spans: list[PromptSpan] = []
    first_row = 0
    for chunk in chunks:
        count = table.sampling(chunk.request_id)[0].num_prompt_logprobs
        if count is not None:
            end = min(chunk.start + chunk.num_tokens, table.num_prompt_tokens(chunk.request_id) - 1)
            if chunk.start < end:
                token_ids = table.token_ids(chunk.request_id, chunk.start + 1, end + 1)
                spans.append(PromptSpan(chunk.request_id, first_row, chunk.start + 1, token_ids, count))
        first_row += chunk.num_tokens
    return spans


def score(
    span: PromptSpan, head: Head, *, most_rows: int, device: torch.device, answers: bool
) -> PromptLogprobs | None:
    """The span's log-probabilities under the unmodified distribution.

    At most `most_rows` rows of logits at one time. All tensor ranks call it, since the head is theirs together; those
    that do not answer get None.
    """
    logprobs: list[float] = []
    top: list[tuple[tuple[int, float], ...]] = []
    for start in range(0, len(span.token_ids), most_rows):
        token_ids = torch.tensor(span.token_ids[start : start + most_rows], device=device)
        rows = torch.arange(len(token_ids), device=device) + (span.first_row + start)
        logits = head(rows)
        if not answers:
            continue
        step = rows_at_once(logits.shape[-1])
        for part, ids in zip(torch.split(logits, step), torch.split(token_ids, step), strict=True):
            found = part.float().log_softmax(dim=-1)
            logprobs += found.gather(1, ids[:, None])[:, 0].tolist()
            top += likeliest(found, [span.count] * len(ids))
    return PromptLogprobs(span.request_id, span.position, tuple(logprobs), tuple(top)) if answers else None
