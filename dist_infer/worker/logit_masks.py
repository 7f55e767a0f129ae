"""Grammars' masks on a batch of logits: what they do not allow becomes impossible."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_NEVER = float("-inf")


def keep_allowed(logits: torch.Tensor, raw: torch.Tensor, masks: Sequence[bytes | None]) -> None:
    """Changes logits [B, vocab] in place. masks: a bit for each token, low bits first; those beyond vocab are ignored.

    Rows without a mask are not touched. Where other options have made all that a mask allows impossible, they are set
    aside for that row: its `raw` logits count, for the grammar must not be broken.
    """
    masked = [row for row, mask in enumerate(masks) if mask is not None]
    if not masked:
        return
    vocab, device = logits.shape[1], logits.device
    packed = torch.stack([_as_tensor(masks[row] or b"", vocab) for row in masked]).to(device)
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    forbidden = (packed[:, :, None] >> bits & 1 == 0).flatten(1)[:, :vocab]
    rows = torch.tensor(masked, device=device)
    kept = logits[rows].masked_fill_(forbidden, _NEVER)
    stuck = (kept == _NEVER).all(dim=1)
    if bool(stuck.any()):
        kept[stuck] = raw[rows[stuck]].masked_fill(forbidden[stuck], _NEVER)
    logits[rows] = kept


def _as_tensor(mask: bytes, vocab: int) -> torch.Tensor:
    num_bytes = -(-vocab // 8)
    if len(mask) < num_bytes:
        raise RuntimeError(f"a mask of {len(mask)} bytes for {vocab} tokens")
    return torch.frombuffer(bytearray(mask[:num_bytes]), dtype=torch.uint8)
