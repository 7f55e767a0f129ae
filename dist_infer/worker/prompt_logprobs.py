"""Log-probabilities of a prompt's own tokens: every row of the prompt goes through the head, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_infer.messages import Chunk, PromptLogprobs
from dist_infer.worker.request_table import RequestTable
from dist_infer.worker.sampler import likeliest, logprob_columns, rows_at_once
from dist_infer.worker.to_device import to_device

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
    token_ids = to_device(np.array(span.token_ids, np.int64), device)
    found: list[torch.Tensor] = []
    for start in range(0, len(span.token_ids), most_rows):
        own = token_ids[start : start + most_rows]
        logits = head(torch.arange(len(own), device=device) + (span.first_row + start))
        if not answers:
            continue
        step = rows_at_once(logits.shape[-1])
        for part, ids in zip(torch.split(logits, step), torch.split(own, step), strict=True):
            found.append(logprob_columns(part.float(), ids, span.count))
    if not answers:
        return None
    rows = torch.cat(found).tolist()
    return PromptLogprobs(
        span.request_id,
        span.position,
        tuple(row[0] for row in rows),
        tuple(likeliest(row[1:], span.count) for row in rows),
    )
