"""Edits of logits that depend on a request's own tokens, for a whole batch at once.

Order, as transformers has it: logit_bias, repetition penalty, presence and frequency penalty, bad words, min_tokens.
They come before the filters and hold for greedy requests, too. What is edited is listed as (row, token) pairs, so that
the work grows with what is edited and not with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from dist_infer.worker.token_history import ANY_TOKEN, TokenHistory

_NEVER = float("-inf")


def edit(logits: torch.Tensor, histories: Sequence[TokenHistory | None]) -> None:
    """Changes logits [B, vocab] (float32) in place; None: that row stays as it is."""
    rows = [(row, history) for row, history in enumerate(histories) if history is not None]
    if biased := [(row, history) for row, history in rows if len(history.bias_ids)]:
        where = _pairs([(row, history.bias_ids) for row, history in biased], logits.device)
        logits[where] += torch.cat([history.bias for _, history in biased]).to(logits.device)
    if penalised := [(row, history) for row, history in rows if history.has_penalty]:
        _penalise(logits, penalised)
    if worded := [(row, history) for row, history in rows if len(history.lasts)]:
        _forbid_last_tokens(logits, worded)
    never = [(row, history.bad_ids) for row, history in rows if len(history.bad_ids)]
    never += [(row, held) for row, history in rows if len(held := history.held_back)]
    if never:
        logits[_pairs(never, logits.device)] = _NEVER


def _pairs(ids: Sequence[tuple[int, torch.Tensor]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and token ids of all the pairs, each [sum of the lengths]."""
    lengths = torch.tensor([len(tokens) for _, tokens in ids])
    rows = torch.tensor([row for row, _ in ids]).repeat_interleave(lengths)
    return rows.to(device), torch.cat([tokens for _, tokens in ids]).to(device)


def _penalise(logits: torch.Tensor, rows: Sequence[tuple[int, TokenHistory]]) -> None:
    seen = [history.seen for _, history in rows]
    where = _pairs([(row, ids) for (row, _), (ids, _) in zip(rows, seen, strict=True)], logits.device)
    counts = torch.cat([counts for _, counts in seen]).to(logits.device)
    lengths = torch.tensor([len(ids) for ids, _ in seen])
    specs = [history.spec for _, history in rows]
    factors = [[spec.repetition_penalty, spec.presence_penalty, spec.frequency_penalty] for spec in specs]
    repetition, presence, frequency = torch.tensor(factors).repeat_interleave(lengths, dim=0).to(logits.device).T
    values = logits[where]
    values = torch.where(values < 0, values * repetition, values / repetition)
    logits[where] = values - frequency * counts - presence * (counts > 0)


def _forbid_last_tokens(logits: torch.Tensor, rows: Sequence[tuple[int, TokenHistory]]) -> None:
    """Of every bad word, its last token where the tokens before it are the request's last ones."""
    width = max(history.prefixes.shape[1] for _, history in rows)
    padded = [pad(history.prefixes, (width - history.prefixes.shape[1], 0), value=ANY_TOKEN) for _, history in rows]
    lengths = torch.tensor([len(words) for words in padded])
    tails = torch.tensor([history.tail(width) for _, history in rows]).repeat_interleave(lengths, dim=0)
    words = torch.cat(padded)
    matches = ((words == tails) | (words == ANY_TOKEN)).all(dim=1)
    batch_rows = torch.tensor([row for row, _ in rows]).repeat_interleave(lengths)
    lasts = torch.cat([history.lasts for _, history in rows])
    logits[batch_rows[matches].to(logits.device), lasts[matches].to(logits.device)] = _NEVER
