"""An executor without a model, for tests of everything above it: checks each plan like a rank, answers at once.

It keeps a KV cache of its own (block, offset) -> token id and reads the tokens back through the block tables before it
"samples", so that a block that is shared, freed too early or computed twice changes the answer, as it would in earnest.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_infer.engine.executor import REPORT_TIMEOUT_S
from dist_infer.messages import (
    Chunk,
    NewRequest,
    PromptLogprobs,
    SampledToken,
    SamplingSpec,
    StepPlan,
    StepResult,
    StreamReport,
    TimelineReport,
    WorkerReport,
)
from partition.errors import ClusterError, WorkerError


@dataclass
class _Known:
    """What a rank keeps of a request."""

    token_ids: list[int]
    block_ids: list[int]
    sampling: SamplingSpec
    num_computed: int = 0
    num_prompt_tokens: int = 0
    num_shared: int = 0  # blocks at the beginning that are others', too


class FakeExecutor:
    """The next token is `next_token(token ids, sampling)`, by default a hash of both below `vocab_size`.

    fail_at_step: `collect` of that step raises WorkerError, as for a lost rank. hang_at_step: that step never answers;
    `collect` ends at its deadline. max_batch_tokens: refuse larger micro-batches. epoch: refuse steps of another.
    `plans`: all that were submitted; the first may have any number. `lose` is the loss of a rank while it is idle.
    Raises WorkerError for whatever a rank would refuse.
    """

    def __init__(
        self,
        *,
        num_kv_blocks: int,
        block_tokens: int,
        vocab_size: int = 256,
        next_token: Callable[[Sequence[int], SamplingSpec], int] | None = None,
        max_batch_tokens: int | None = None,
        fail_at_step: int | None = None,
        hang_at_step: int | None = None,
        epoch: int = 0,
    ) -> None:
        self.num_kv_blocks = num_kv_blocks
        self.block_tokens = block_tokens
        self.vocab_size = vocab_size
        self.plans: list[StepPlan] = []
        self.max_in_flight = 0
        self._next_token = next_token or self.hashed_token
        self._max_batch_tokens = max_batch_tokens
        self._fail_at_step = fail_at_step
        self._hang_at_step = hang_at_step
        self._epoch = epoch
        self._on_loss: Callable[[ClusterError], None] | None = None
        self._known: dict[str, _Known] = {}
        self._cache: dict[tuple[int, int], int] = {}
        self._results: deque[tuple[StepResult, frozenset[str]]] = deque()
        self._closed = threading.Event()

    def hashed_token(self, token_ids: Sequence[int], sampling: SamplingSpec) -> int:
        """Depends on every token, their order and, unless greedy, on the seed."""
        salt = sampling.seed if sampling.temperature else 0
        return zlib.crc32(repr((salt, list(token_ids))).encode()) % self.vocab_size

    def start(self) -> tuple[WorkerReport, ...]:
        report = WorkerReport(
            rank=0,
            host="localhost",
            pid=0,
            num_kv_blocks=self.num_kv_blocks,
            resident_bytes=0,
            slot_bytes=0,
            kv_bytes=0,
            rss_bytes=0,
            kernels="",
            reader="none",
            load_s=0.0,
        )
        return (report,)

    def watch(self, on_loss: Callable[[ClusterError], None]) -> None:
        self._on_loss = on_loss

    def lose(self) -> None:
        """A rank is gone: whoever watches is told."""
        if self._on_loss is not None:
            self._on_loss(WorkerError("rank 0 is gone, as scripted", rank=0))

    def submit(self, plan: StepPlan) -> None:
        if self._closed.is_set():
            raise ClusterError("the executor is closed")
        if self.plans and plan.step_id != self.plans[-1].step_id + 1:
            raise _refusal(plan, f"step {self.plans[-1].step_id + 1} is next")
        if plan.epoch != self._epoch:
            raise _refusal(plan, f"it is of epoch {plan.epoch}, this is {self._epoch}")
        self.plans.append(plan)
        self._take_in(plan)
        tokens: list[SampledToken] = []
        prompts: list[PromptLogprobs] = []
        for batch in plan.micro_batches:
            num_tokens = sum(chunk.num_tokens for chunk in batch)
            if num_tokens == 0 or (self._max_batch_tokens is not None and num_tokens > self._max_batch_tokens):
                raise _refusal(plan, f"a micro-batch of {num_tokens} tokens, at most {self._max_batch_tokens} fit")
            for chunk in batch:
                self._compute(plan, chunk)
                prompts += self._score_prompt(chunk)
                if chunk.sample:
                    tokens.append(self._sample(chunk.request_id))
        in_step = frozenset(chunk.request_id for batch in plan.micro_batches for chunk in batch)
        self._results.append((StepResult(plan.step_id, tuple(tokens), tuple(prompts)), in_step))
        self.max_in_flight = max(self.max_in_flight, len(self._results))

    def collect(self, timeout_s: float) -> StepResult:
        if self._closed.is_set():
            raise ClusterError("the executor is closed")
        if not self._results:
            raise ClusterError("collect: no step is in flight")
        result = self._results[0][0]
        if result.step_id == self._fail_at_step:
            raise WorkerError(f"rank 0 failed at step {result.step_id}, as scripted", rank=0)
        if result.step_id == self._hang_at_step:
            if self._closed.wait(timeout_s):
                raise ClusterError(f"closed while step {result.step_id} was in flight")
            raise ClusterError(f"step {result.step_id} gave no result within {timeout_s:g} s")
        self._results.popleft()
        return result

    def stream_reports(self, timeout_s: float = REPORT_TIMEOUT_S) -> tuple[StreamReport, ...]:
        return ()

    def timelines(self) -> tuple[TimelineReport, ...]:
        return ()

    def close(self) -> None:
        self._closed.set()

    def _take_in(self, plan: StepPlan) -> None:
        """Requests that end, begin and change; then who owns which block."""
        busy = frozenset[str]().union(*(ids for _, ids in self._results))
        for request_id in plan.finished:
            if request_id in busy:
                raise _refusal(plan, f"{request_id!r} ended while a step that writes its blocks is in flight")
            if self._known.pop(request_id, None) is None:
                raise _refusal(plan, f"{request_id!r} ended, but is not known")
        for request in plan.new:
            if request.request_id in self._known:
                raise _refusal(plan, f"{request.request_id!r} is new, but already known")
            known = _Known(list(request.token_ids), list(request.block_ids), request.sampling)
            if request.fork_of is not None:
                self._fork(plan, request, known)
            elif request.num_computed:
                raise _refusal(plan, f"{request.request_id!r} has {request.num_computed} tokens that nobody computed")
            known.num_prompt_tokens = len(known.token_ids) - request.num_output_tokens
            self._known[request.request_id] = known
        in_step = {chunk.request_id for batch in plan.micro_batches for chunk in batch}
        for diff in plan.diffs:
            if diff.request_id not in self._known or diff.request_id not in in_step:
                raise _refusal(plan, f"a diff of {diff.request_id!r}, which is not known or not in the step")
            if not diff.new_token_ids and not diff.new_block_ids:
                raise _refusal(plan, f"an empty diff of {diff.request_id!r}")
            self._known[diff.request_id].token_ids += diff.new_token_ids
            self._known[diff.request_id].block_ids += diff.new_block_ids
        if unknown := in_step - self._known.keys():
            raise _refusal(plan, f"{sorted(unknown)} are not known")
        if shared := in_step & busy:
            raise _refusal(plan, f"{sorted(shared)} are in another step in flight")
        blocks = [block for known in self._known.values() for block in known.block_ids[known.num_shared :]]
        if len(set(blocks)) != len(blocks):
            raise _refusal(plan, "two live requests share a block")
        if any(not 0 <= block < self.num_kv_blocks for block in blocks):
            raise _refusal(plan, f"a block id outside [0, {self.num_kv_blocks})")

    def _fork(self, plan: StepPlan, request: NewRequest, known: _Known) -> None:
        """Blocks that the common tokens fill are shared, what is over is copied, as ranks do; so are the tokens."""
        origin = self._known.get(request.fork_of or "")
        num_shared, num_rows = divmod(request.num_computed, self.block_tokens)
        if origin is None or origin.num_computed < request.num_computed:
            raise _refusal(plan, f"{request.request_id!r} is a fork of {request.fork_of!r}, not known that far")
        known.token_ids = origin.token_ids[: request.num_computed] + known.token_ids
        if origin.block_ids[:num_shared] != known.block_ids[:num_shared]:
            raise _refusal(plan, f"{request.request_id!r} does not share the blocks of {request.fork_of!r}")
        for offset in range(num_rows):
            source, target = origin.block_ids[num_shared], known.block_ids[num_shared]
            self._cache[target, offset] = self._cache[source, offset]
        known.num_computed, known.num_shared = request.num_computed, num_shared

    def _score_prompt(self, chunk: Chunk) -> list[PromptLogprobs]:
        """The token at position p has logprob -p; the likeliest are the ids from its own on."""
        known = self._known[chunk.request_id]
        count = known.sampling.num_prompt_logprobs
        positions = range(chunk.start + 1, min(chunk.start + chunk.num_tokens, known.num_prompt_tokens - 1) + 1)
        if count is None or not positions:
            return []
        top = (
            tuple(((known.token_ids[at] + rank) % self.vocab_size, float(-at - rank)) for rank in range(count))
            for at in positions
        )
        logprobs = tuple(float(-at) for at in positions)
        return [PromptLogprobs(chunk.request_id, positions.start, logprobs, tuple(top))]

    def _compute(self, plan: StepPlan, chunk: Chunk) -> None:
        known = self._known[chunk.request_id]
        end = chunk.start + chunk.num_tokens
        if chunk.start != known.num_computed or chunk.num_tokens < 1 or end > len(known.token_ids):
            raise _refusal(plan, f"{chunk} with {known.num_computed} tokens computed and {len(known.token_ids)} known")
        if chunk.sample != (end == len(known.token_ids)):
            raise _refusal(plan, f"{chunk} must sample exactly when it ends at {len(known.token_ids)}")
        if end > len(known.block_ids) * self.block_tokens:
            raise _refusal(plan, f"{chunk} ends beyond its {len(known.block_ids)} blocks of {self.block_tokens}")
        for position in range(chunk.start, end):
            block = known.block_ids[position // self.block_tokens]
            if sum(block in other.block_ids for other in self._known.values()) > 1:
                raise _refusal(plan, f"{chunk} writes into block {block}, which is another's, too")
            self._cache[block, position % self.block_tokens] = known.token_ids[position]
        known.num_computed = end

    def _sample(self, request_id: str) -> SampledToken:
        known = self._known[request_id]
        seen = [
            self._cache[known.block_ids[position // self.block_tokens], position % self.block_tokens]
            for position in range(known.num_computed)
        ]
        token_id = self._next_token(seen, known.sampling)
        if known.sampling.num_logprobs is None:
            return SampledToken(request_id, token_id)
        others = range(token_id, token_id + known.sampling.num_logprobs)
        top = tuple((other % self.vocab_size, -0.5 - rank) for rank, other in enumerate(others))
        return SampledToken(request_id, token_id, -0.5, top)


def _refusal(plan: StepPlan, why: str) -> WorkerError:
    return WorkerError(f"rank 0 refuses step {plan.step_id}: {why}", rank=0)
