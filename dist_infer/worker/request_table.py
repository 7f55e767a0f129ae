"""What a rank knows of the running requests: token ids and block tables, kept current by step plans.

It checks what the coordinator says (a chunk must start where the request stands) and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from dist_infer.messages import Chunk, NewRequest, SamplingSpec, StepPlan
from dist_infer.model.batch_view import BatchView, SequenceSpan
from dist_infer.worker.to_device import to_device

Ids = NDArray[np.int64]


@dataclass
class _Row:
    token_ids: list[int]
    sampling: SamplingSpec
    block_ids: list[int] = field(default_factory=list)
    consecutive: bool = True
    num_computed: int = 0
    num_prompt_tokens: int = 0
    slot: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as tensors. token_ids, position_ids [1, T]; sample_rows: rows of the packed row to sample."""

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    view: BatchView
    sample_rows: torch.Tensor
    sample_requests: tuple[str, ...]


@dataclass(frozen=True)
class ForkCopies:
    """From where to where: rows of a paged block that is filled in part, and rings. None: nothing to copy."""

    rows: tuple[slice, slice] | None
    slots: tuple[int, int] | None


class RequestTable:
    """Owned by one rank's stage runner; changed only by `apply` and `micro_batch`.

    num_slots: KV rings, where layers keep rings: a request has the smallest that is free from when it comes until it
    goes. All ranks see the same plans in the same order, so a request has the same one everywhere.
    """

    def __init__(self, block_tokens: int, num_blocks: int, device: torch.device, num_slots: int = 0) -> None:
        self._rows: dict[str, _Row] = {}
        self._block_tokens, self._num_blocks, self._device = block_tokens, num_blocks, device
        self._num_slots = num_slots
        self._free_slots = set(range(num_slots))
        self._last_step: int | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def sampling(self, request_id: str) -> tuple[SamplingSpec, int]:
        """The request's sampling and the position (number of tokens so far) of the token about to be drawn."""
        row = self._rows[request_id]
        return row.sampling, len(row.token_ids)

    def token_ids(self, request_id: str, start: int = 0, end: int | None = None) -> list[int]:
        """Tokens [start, end) of the request, a copy."""
        return self._rows[request_id].token_ids[start:end]

    def num_prompt_tokens(self, request_id: str) -> int:
        return self._rows[request_id].num_prompt_tokens

    def fork(self, new: NewRequest) -> ForkCopies:
        """What a request that `apply` has added as a fork takes over from its origin, beside what they share."""
        origin, row = self._origin(new), self._rows[new.request_id]
        num_shared, num_rows = divmod(new.num_computed, self._block_tokens)
        if origin.block_ids[:num_shared] != row.block_ids[:num_shared]:
            raise RuntimeError(f"request {new.request_id} does not share the blocks of {new.fork_of}")
        rows = None
        if num_rows:
            source, target = (known.block_ids[num_shared] * self._block_tokens for known in (origin, row))
            rows = slice(source, source + num_rows), slice(target, target + num_rows)
        return ForkCopies(rows, (origin.slot, row.slot) if self._num_slots else None)

    def apply(self, plan: StepPlan) -> None:
        """Finished first, then new, then diffs. Raises RuntimeError when the plan does not follow the last one."""
        if self._last_step is not None and plan.step_id != self._last_step + 1:
            raise RuntimeError(f"step {plan.step_id} after step {self._last_step}: a step was lost or repeated")
        self._last_step = plan.step_id
        for request_id in plan.finished:
            gone = self._rows.pop(request_id, None)
            if gone is not None and self._num_slots:
                self._free_slots.add(gone.slot)
        for new in plan.new:
            self._add(new)
        for diff in plan.diffs:
            row = self._rows[diff.request_id]
            row.token_ids.extend(diff.new_token_ids)
            self._extend_blocks(row, diff.new_block_ids)

    def micro_batch(self, chunks: tuple[Chunk, ...]) -> MicroBatch:
        """The chunks as one packed row; marks their tokens as computed. One copy to the device for all of it."""
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        columns = np.empty((4, num_tokens), np.int64)
        token_ids, slots, positions, writes = columns
        kv_rows: list[slice | Ids] = []
        ends: list[int] = []
        sample_rows: list[int] = []
        first = 0
        for chunk in chunks:
            row = self._rows[chunk.request_id]
            end = chunk.start + chunk.num_tokens
            if chunk.start != row.num_computed or end > len(row.token_ids):
                raise RuntimeError(
                    f"request {chunk.request_id}: chunk [{chunk.start}, {end}) of {len(row.token_ids)} tokens, "
                    f"{row.num_computed} computed"
                )
            rows = self._kv_rows(row, end)
            here = slice(first, first + chunk.num_tokens)
            token_ids[here] = row.token_ids[chunk.start : end]
            slots[here] = row.slot
            positions[here] = np.arange(chunk.start, end)
            writes[here] = rows[chunk.start :] if not isinstance(rows, slice) else positions[here] + rows.start
            kv_rows.append(rows)
            ends.append(end)
            row.num_computed = end
            first = here.stop
            if chunk.sample:
                sample_rows.append(first - 1)
        gathered = [rows for rows in kv_rows if not isinstance(rows, slice)]
        parts = [columns.reshape(-1), np.array(sample_rows, np.int64), *gathered]
        joined = to_device(np.concatenate(parts), self._device)
        packed, samples, *indices = torch.split(joined, [len(part) for part in parts])
        packed = packed.view(4, num_tokens)
        spans: list[SequenceSpan] = []
        first = 0
        for chunk, rows, end in zip(chunks, kv_rows, ends, strict=True):
            where = rows if isinstance(rows, slice) else indices.pop(0)
            spans.append(SequenceSpan(first, first + chunk.num_tokens, end, where, self._rows[chunk.request_id].slot))
            first += chunk.num_tokens
        return MicroBatch(
            packed[:1],
            packed[2:3],
            BatchView(packed[3], tuple(spans), packed[1:3] if self._num_slots else None),
            samples,
            tuple(chunk.request_id for chunk in chunks if chunk.sample),
        )

    def _add(self, new: NewRequest) -> None:
        if new.request_id in self._rows:
            raise RuntimeError(f"request {new.request_id} is already running")
        token_ids = list(new.token_ids)
        if new.fork_of is not None:
            token_ids = self._origin(new).token_ids[: new.num_computed] + token_ids
        elif new.num_computed:
            raise RuntimeError(f"request {new.request_id} has {new.num_computed} tokens that nobody computed")
        row = self._rows[new.request_id] = _Row(
            token_ids,
            new.sampling,
            num_computed=new.num_computed,
            num_prompt_tokens=len(token_ids) - new.num_output_tokens,
        )
        if self._num_slots:
            if not self._free_slots:
                raise RuntimeError(f"request {new.request_id}: all {self._num_slots} KV rings are in use")
            row.slot = min(self._free_slots)
            self._free_slots.remove(row.slot)
        self._extend_blocks(row, new.block_ids)

    def _origin(self, new: NewRequest) -> _Row:
        origin = self._rows.get(new.fork_of or "")
        if origin is None or new.fork_of == new.request_id or origin.num_computed < new.num_computed:
            raise RuntimeError(f"request {new.request_id} is a fork of {new.fork_of}, which is not known that far")
        return origin

    def _extend_blocks(self, row: _Row, block_ids: tuple[int, ...]) -> None:
        for block in block_ids:
            if not 0 <= block < self._num_blocks:
                raise RuntimeError(f"KV block {block} of {self._num_blocks}")
            row.consecutive = row.consecutive and (not row.block_ids or block == row.block_ids[-1] + 1)
            row.block_ids.append(block)

    def _kv_rows(self, row: _Row, length: int) -> slice | Ids:
        if length > len(row.block_ids) * self._block_tokens:
            raise RuntimeError(f"{length} tokens in {len(row.block_ids)} KV blocks of {self._block_tokens}")
        if row.consecutive:
            first = row.block_ids[0] * self._block_tokens
            return slice(first, first + length)
        blocks = np.array(row.block_ids, np.int64)
        return (blocks[:, None] * self._block_tokens + np.arange(self._block_tokens)).reshape(-1)[:length]
