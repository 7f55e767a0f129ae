"""What a rank knows of the running requests: token ids and block tables, kept current by step plans.

It checks what the coordinator says (a chunk must start where the request stands) and decides nothing.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import torch

from dist_infer.messages import Chunk, NewRequest, SamplingSpec, StepPlan
from dist_infer.model.batch_view import BatchView, SequenceSpan


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
        self._free_slots = list(range(num_slots))
        self._last_step: int | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def sampling(self, request_id: str) -> tuple[SamplingSpec, int]:
        """The request's sampling and the position (number of tokens so far) of the token about to be drawn."""
        row = self._rows[request_id]
        return row.sampling, len(row.token_ids)

    def token_ids(self, request_id: str, start: int, end: int) -> list[int]:
        """Tokens [start, end) of the request."""
        return self._rows[request_id].token_ids[start:end]

    def num_prompt_tokens(self, request_id: str) -> int:
        return self._rows[request_id].num_prompt_tokens

    def fork(self, new: NewRequest) -> ForkCopies:
        """What a request that `apply` has added as a fork takes over from its origin, beside the blocks they share."""
        origin, row = self._rows.get(new.fork_of or ""), self._rows[new.request_id]
        num_shared, num_rows = divmod(new.num_computed, self._block_tokens)
        if origin is None or origin is row or origin.num_computed < new.num_computed:
            raise RuntimeError(f"request {new.request_id} is a fork of {new.fork_of}, which is not known that far")
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
                heapq.heappush(self._free_slots, gone.slot)
        for new in plan.new:
            self._add(new)
        for diff in plan.diffs:
            row = self._rows[diff.request_id]
            row.token_ids.extend(diff.new_token_ids)
            self._extend_blocks(row, diff.new_block_ids)

    def micro_batch(self, chunks: tuple[Chunk, ...]) -> MicroBatch:
        """The chunks as one packed row; marks their tokens as computed."""
        token_ids: list[int] = []
        positions: list[int] = []
        writes: list[torch.Tensor] = []
        slots: list[int] = []
        spans: list[SequenceSpan] = []
        sample_rows: list[int] = []
        sample_requests: list[str] = []
        for chunk in chunks:
            row = self._rows[chunk.request_id]
            end = chunk.start + chunk.num_tokens
            if chunk.start != row.num_computed or end > len(row.token_ids):
                raise RuntimeError(
                    f"request {chunk.request_id}: chunk [{chunk.start}, {end}) of {len(row.token_ids)} tokens, "
                    f"{row.num_computed} computed"
                )
            kv_rows = self._kv_rows(row, end)
            first = len(token_ids)
            token_ids.extend(row.token_ids[chunk.start : end])
            positions.extend(range(chunk.start, end))
            if isinstance(kv_rows, slice):
                writes.append(torch.arange(kv_rows.start + chunk.start, kv_rows.stop))
            else:
                writes.append(kv_rows[chunk.start :])
                kv_rows = self._on_device(kv_rows)
            slots += [row.slot] * chunk.num_tokens
            spans.append(SequenceSpan(first, len(token_ids), end, kv_rows, row.slot))
            row.num_computed = end
            if chunk.sample:
                sample_rows.append(len(token_ids) - 1)
                sample_requests.append(chunk.request_id)
        return MicroBatch(
            self._on_device(torch.tensor([token_ids])),
            self._on_device(torch.tensor([positions])),
            BatchView(
                self._on_device(torch.cat(writes)),
                tuple(spans),
                self._on_device(torch.tensor([slots, positions])) if self._num_slots else None,
            ),
            self._on_device(torch.tensor(sample_rows, dtype=torch.long)),
            tuple(sample_requests),
        )

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Does not wait for the device; torch keeps pinned memory until it is copied."""
        if self._device.type != "cuda":
            return values.to(self._device)
        return values.pin_memory().to(self._device, non_blocking=True)

    def _add(self, new: NewRequest) -> None:
        if new.request_id in self._rows:
            raise RuntimeError(f"request {new.request_id} is already running")
        row = self._rows[new.request_id] = _Row(
            list(new.token_ids),
            new.sampling,
            num_computed=new.num_computed,
            num_prompt_tokens=len(new.token_ids) - new.num_output_tokens,
        )
        if self._num_slots:
            if not self._free_slots:
                raise RuntimeError(f"request {new.request_id}: all {self._num_slots} KV rings are in use")
            row.slot = heapq.heappop(self._free_slots)
        self._extend_blocks(row, new.block_ids)

    def _extend_blocks(self, row: _Row, block_ids: tuple[int, ...]) -> None:
        for block in block_ids:
            if not 0 <= block < self._num_blocks:
                raise RuntimeError(f"KV block {block} of {self._num_blocks}")
            row.consecutive = row.consecutive and (not row.block_ids or block == row.block_ids[-1] + 1)
            row.block_ids.append(block)

    def _kv_rows(self, row: _Row, length: int) -> slice | torch.Tensor:
        if length > len(row.block_ids) * self._block_tokens:
            raise RuntimeError(f"{length} tokens in {len(row.block_ids)} KV blocks of {self._block_tokens}")
        if row.consecutive:
            first = row.block_ids[0] * self._block_tokens
            return slice(first, first + length)
        blocks = torch.tensor(row.block_ids)
        return (blocks[:, None] * self._block_tokens + torch.arange(self._block_tokens)).flatten()[:length]
