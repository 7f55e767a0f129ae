"""Which tokens of which requests are computed in the next step.

Phaseless: a request has computed tokens and a target (all tokens it has); a step hands out a budget of tokens until the
computed ones catch up. Prompt, decode, a prompt in chunks and a prompt again after a preemption are one case.

    schedule() ──StepPlan──> ranks ──StepResult──> apply() ──(request, token)──> the loop, which calls finish()

Does not belong here: text, stop conditions, events, clocks, threads, random numbers, tensors, sharding, any wait.
The same calls in the same order give the same plans.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from dist_infer.engine.kv_blocks import KVBlockManager
from dist_infer.engine.request import Request, RequestState
from dist_infer.messages import Chunk, NewRequest, RequestDiff, SampledToken, StepPlan, StepResult
from partition.errors import ClusterError, ConfigError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """`max_requests` own blocks at one time at most; `max_model_len` is prompt and answer together.

    `shares_prompts`: the ranks' caches can be taken over in part, so that several answers compute their prompt once.
    `has_rings`: layers that look back through a window keep rings, in which a prompt's rows are overwritten in time.
    """

    num_kv_blocks: int
    block_tokens: int
    max_batch_tokens: int
    max_micro_batches: int
    max_requests: int
    max_model_len: int
    max_steps_in_flight: int
    shares_prompts: bool = True
    has_rings: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")

    @property
    def step_tokens(self) -> int:
        """The token budget of a step."""
        return self.max_batch_tokens * self.max_micro_batches


@dataclass
class _Draft:
    """A step being filled."""

    num_tokens_left: int
    shares: list[tuple[Request, int]] = field(default_factory=list)

    def add(self, request: Request, num_tokens: int) -> None:
        self.shares.append((request, num_tokens))
        self.num_tokens_left -= num_tokens


@dataclass(frozen=True)
class _Family:
    """What a waiting request finds among its siblings: one that has the prompt, or one that is computing it."""

    origin: Request | None = None
    is_computing: bool = False


_NO_FAMILY = _Family()
_COMPUTING = _Family(is_computing=True)


class Scheduler:
    """Owns the requests and their blocks; used by the engine's thread alone, but for `token_limit`."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.num_preemptions = 0
        self._blocks = KVBlockManager(num_blocks=config.num_kv_blocks, block_tokens=config.block_tokens)
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []  # both by `turn`
        self._running: list[Request] = []  # ABORTING ones too
        self._in_flight: deque[StepPlan] = deque()
        self._to_forget: list[str] = []  # what the next step tells the ranks
        self._num_steps = 0
        self._num_added = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_steps(self) -> int:
        return self._num_steps

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def token_limit(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Length at which such a request ends. ConfigError when it can never fit. Pure: any thread may ask."""
        config = self.config
        if num_prompt_tokens < 1:
            raise ConfigError("the prompt has no tokens: it needs at least 1")
        if num_prompt_tokens + 1 > config.max_model_len:
            raise ConfigError(
                f"the prompt has {num_prompt_tokens} tokens and an answer needs at least 1, {num_prompt_tokens + 1} "
                f"together, but max_model_len is {config.max_model_len}: shorten the prompt or raise max_model_len"
            )
        kv_tokens = config.num_kv_blocks * config.block_tokens
        asked = config.max_model_len if max_tokens is None else num_prompt_tokens + max_tokens
        limit = min(asked, config.max_model_len)
        if max_tokens is None:
            limit = max(min(limit, kv_tokens), num_prompt_tokens + 1)  # as far as it goes
        need = -(-limit // config.block_tokens)
        if need > config.num_kv_blocks:
            raise ConfigError(
                f"{num_prompt_tokens} prompt tokens and up to {limit - num_prompt_tokens} new ones need {need} KV "
                f"blocks of {config.block_tokens} tokens, but there are {config.num_kv_blocks} ({kv_tokens} tokens): "
                f"lower max_tokens, shorten the prompt or give the KV cache more memory"
            )
        return limit

    def add(self, request: Request) -> None:
        """Queue it. ConfigError when it can never fit, or when its id is in use."""
        if request.id in self._requests:
            raise ConfigError(f"request id {request.id!r} is in use: wait for its end or choose another")
        request.token_limit = self.token_limit(request.num_prompt_tokens, request.params.max_tokens)
        request.arrival_index = self._num_added
        self._num_added += 1
        self._requests[request.id] = request
        insort(self._waiting, request, key=_turn)

    def schedule(self) -> StepPlan | None:
        """The next step; None when as many as allowed are in flight, or nothing can go into one now."""
        if len(self._in_flight) >= self.config.max_steps_in_flight:
            return None
        draft = _Draft(self.config.step_tokens)
        num_preemptions = self.num_preemptions
        all_got_blocks = self._continue_running(draft)
        if all_got_blocks and self.num_preemptions == num_preemptions:
            self._admit_waiting(draft)
        if draft.shares:
            return self._send(draft)
        if self._requests and not self._in_flight:
            raise RuntimeError(f"scheduler: {len(self._requests)} requests and nothing to do; this is a bug")
        return None

    def apply(self, result: StepResult) -> list[tuple[Request, SampledToken]]:
        """Take in the oldest step's result; the new tokens, already appended to their requests, oldest chunk first.

        Blocks of requests aborted meanwhile are freed here. ClusterError when the result is not that step's.
        """
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            oldest = self._in_flight[0].step_id if self._in_flight else None
            raise ClusterError(f"the ranks answered step {result.step_id}, but the oldest step in flight is {oldest}")
        chunks = [chunk for batch in self._in_flight[0].micro_batches for chunk in batch]
        asked = {chunk.request_id for chunk in chunks if chunk.sample}
        sampled = {token.request_id: token for token in result.tokens}
        if asked != sampled.keys() or len(asked) != len(result.tokens):
            raise ClusterError(
                f"step {result.step_id} asked for one token each of {sorted(asked)}, "
                f"the ranks answered for {[token.request_id for token in result.tokens]}"
            )
        self._in_flight.popleft()
        for chunk in chunks:
            self._requests[chunk.request_id].num_computed += chunk.num_tokens
        new_tokens: list[tuple[Request, SampledToken]] = []
        for request_id in dict.fromkeys(chunk.request_id for chunk in chunks):
            request = self._requests[request_id]
            request.in_flight_step = None
            if request.state is RequestState.ABORTING:
                self._forget(request)
            elif request_id in sampled:
                request.token_ids.append(sampled[request_id].token_id)
                new_tokens.append((request, sampled[request_id]))
        return new_tokens

    def finish(self, request: Request) -> None:
        """Its last token was taken. RuntimeError while it is in flight: that is `abort`'s case."""
        if request.in_flight_step is not None:
            raise RuntimeError(f"request {request.id!r} finished while step {request.in_flight_step} has it in flight")
        self._forget(request)

    def abort(self, request_id: str) -> None:
        """No more tokens of it. In flight: its blocks stay its own until that step was applied. Unknown: nothing."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.in_flight_step is not None:
            request.state = RequestState.ABORTING
        else:
            self._forget(request)

    def rewind(self, config: SchedulerConfig | None = None) -> list[Request]:
        """The ranks are gone, with all they knew: every request waits to be computed again, from what it has so far.

        Turns, answers and draws stay as they were. Steps in flight never were; who was aborted in one is forgotten.
        config: of the ranks that come; requests that they have no room for are forgotten and returned.
        """
        self.config = config or self.config
        self._blocks = KVBlockManager(num_blocks=self.config.num_kv_blocks, block_tokens=self.config.block_tokens)
        self._in_flight.clear()
        self._to_forget = []
        self._running = []
        misfits: list[Request] = []
        for request in list(self._requests.values()):
            request.start_over()
            if request.state is RequestState.ABORTING:
                self._drop(request)
            elif config is not None and not self._fits(request):
                self._drop(request)
                misfits.append(request)
            else:
                request.state = RequestState.WAITING
        self._waiting = sorted(self._requests.values(), key=_turn)
        return misfits

    def integrity(self) -> None:
        """RuntimeError unless every block is free or owned by one running request, and none is left when idle."""
        self._blocks.integrity()
        owned = {request.id: tuple(request.block_ids) for request in self._requests.values() if request.block_ids}
        if owned != self._blocks.owners():
            raise RuntimeError(f"KV blocks of {sorted(self._blocks.owners())} owned, requests hold {sorted(owned)}")
        listed = sorted(request.id for request in self._waiting + self._running)
        if listed != sorted(self._requests):
            raise RuntimeError(f"requests waiting or running {listed} != requests known {sorted(self._requests)}")
        if any(request.block_ids for request in self._waiting):
            raise RuntimeError("a waiting request owns KV blocks")

    # ---- filling a step

    def _continue_running(self, draft: _Draft) -> bool:
        """Running requests, by turn. False when one has to wait for a block."""
        num_steps = self.config.max_steps_in_flight
        ready = [request for request in self._running if request.is_ready]
        ready = ready[: -(-len(self._running) // num_steps)]  # leave the other steps their part
        num_decodes = sum(request.num_to_compute == 1 for request in ready)
        for request in ready:
            if draft.num_tokens_left == 0:
                break
            if not request.is_ready:
                continue  # preempted a moment ago
            wanted = request.num_to_compute
            num_decodes -= wanted == 1
            # a long prompt leaves the decodes behind it their token, but always gets on itself
            share = min(wanted, max(1, draft.num_tokens_left - num_decodes))
            if not self._own_blocks(request):
                return False
            draft.add(request, share)
        return True

    def _admit_waiting(self, draft: _Draft) -> None:
        """By turn, and whole: blocks for all known tokens at once, so that they lie in one run."""
        config = self.config
        num_active = min(len(self._running) + len(self._waiting), config.max_requests)
        num_per_step = -(-num_active // config.max_steps_in_flight)
        families: dict[Request, _Family] = {}  # by the first of its siblings: each is looked at once, not by each of it
        index = 0
        while index < len(self._waiting) and len(self._running) < config.max_requests:
            if draft.num_tokens_left == 0 or len(draft.shares) >= num_per_step:
                return
            request = self._waiting[index]
            family = _NO_FAMILY
            if self._may_fork(request):
                first = request.siblings[0]
                if first not in families:
                    families[first] = self._family(request)
                family = families[first]
            if family.is_computing:
                index += 1  # soon it need not be computed again; whoever is behind may go first
                continue
            origin = family.origin
            num_shared = (request.num_prompt_tokens - 1) // config.block_tokens if origin is not None else 0
            # one spare block for each running request, or it would be preempted again at once
            need = self._blocks.blocks_for(request.num_tokens) - num_shared
            if not self._blocks.can_allocate(need + len(self._running)):
                return
            del self._waiting[index]
            if origin is not None:
                request.block_ids += self._blocks.share(request.id, origin.id, num_shared)
                request.num_computed = request.num_prompt_tokens - 1
                request.fork_of = origin.id
            elif self._may_fork(request):
                families[request.siblings[0]] = _COMPUTING
            request.block_ids += self._blocks.allocate(request.id, need)
            request.state = RequestState.RUNNING
            insort(self._running, request, key=_turn)
            draft.add(request, min(request.num_to_compute, draft.num_tokens_left))

    def _family(self, request: Request) -> _Family:
        """Whether a sibling has the prompt, all but its last token, which gives each its own logits; or computes it.

        In rings the prompt's rows may be overwritten by one that has gone on far.
        """
        num_common = request.num_prompt_tokens - 1
        found = _NO_FAMILY
        for other in request.siblings:
            if other.state is not RequestState.RUNNING:
                continue
            if other.num_computed < num_common:
                found = _COMPUTING
            elif other.is_known_to_ranks and (
                not self.config.has_rings or other.num_output_tokens <= self.config.max_batch_tokens
            ):
                return _Family(other)
        return found

    def _may_fork(self, request: Request) -> bool:
        """A prompt of one token has nothing to take over; one that is scored has to be computed, every row of it."""
        is_scored = request.sampling.num_prompt_logprobs is not None
        has_siblings = bool(request.siblings) and self.config.shares_prompts
        return has_siblings and request.num_prompt_tokens > 1 and not is_scored

    def _own_blocks(self, request: Request) -> bool:
        """Blocks for all its known tokens, if need be from requests whose turn is later, the latest first.

        False: it has to wait, and keeps its own. The first of all is never a victim, and with no step in flight nobody
        is safe from it: it always gets on.
        """
        need = self._blocks.blocks_for(request.num_tokens) - len(request.block_ids)
        if need <= 0:
            return True
        while not self._blocks.can_allocate(need):
            victim = next((other for other in reversed(self._running) if other.is_ready), request)
            if victim.turn <= request.turn:
                return False
            self._preempt(victim)
        request.block_ids += self._blocks.allocate(request.id, need)
        return True

    def _preempt(self, request: Request) -> None:
        self._blocks.free(request.id)
        self._tell_ranks_to_forget(request)
        request.block_ids = []
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self._running.remove(request)
        insort(self._waiting, request, key=_turn)  # in front of its equals that never ran
        self.num_preemptions += 1

    def _send(self, draft: _Draft) -> StepPlan:
        """Cut the shares into micro-batches and note what the ranks know from now on."""
        new: list[NewRequest] = []
        diffs: list[RequestDiff] = []
        for request, _ in draft.shares:
            tokens = tuple(request.token_ids[request.num_sent_tokens :])
            blocks = tuple(request.block_ids[request.num_sent_blocks :])
            if not request.is_known_to_ranks:
                new.append(_introduced(request))
                request.fork_of = None
            elif tokens or blocks:
                diffs.append(RequestDiff(request.id, tokens, blocks))
            request.num_sent_tokens = len(request.token_ids)
            request.num_sent_blocks = len(request.block_ids)
            request.in_flight_step = self._num_steps
        plan = StepPlan(
            step_id=self._num_steps,
            micro_batches=self._micro_batches(draft),
            new=tuple(new),
            diffs=tuple(diffs),
            finished=tuple(self._to_forget),
        )
        self._to_forget = []
        self._num_steps += 1
        self._in_flight.append(plan)
        return plan

    def _micro_batches(self, draft: _Draft) -> tuple[tuple[Chunk, ...], ...]:
        """Each full but for the last; a share that does not fit goes on in the next one."""
        batches: list[list[Chunk]] = [[]]
        room = self.config.max_batch_tokens
        for request, share in draft.shares:
            start, end = request.num_computed, request.num_computed + share
            while start < end:
                if room == 0:
                    batches.append([])
                    room = self.config.max_batch_tokens
                num_tokens = min(room, end - start)
                sample = start + num_tokens == request.num_tokens
                batches[-1].append(Chunk(request.id, start, num_tokens, sample))
                start += num_tokens
                room -= num_tokens
        return tuple(tuple(batch) for batch in batches)

    # ---- letting go

    def _forget(self, request: Request) -> None:
        del self._requests[request.id]
        (self._waiting if request.state is RequestState.WAITING else self._running).remove(request)
        self._blocks.free(request.id)
        self._tell_ranks_to_forget(request)
        request.block_ids = []
        request.state = RequestState.FINISHED

    def _drop(self, request: Request) -> None:
        """Of a request that owns nothing any more."""
        del self._requests[request.id]
        request.state = RequestState.FINISHED

    def _fits(self, request: Request) -> bool:
        """Under a new config. What was asked for in tokens is not cut short; "as far as it goes" may be nearer now."""
        most = min(self.config.max_model_len, self.config.num_kv_blocks * self.config.block_tokens)
        if request.params.max_tokens is None:
            request.token_limit = min(request.token_limit, most)
        return request.num_tokens < request.token_limit <= most

    def _tell_ranks_to_forget(self, request: Request) -> None:
        if request.is_known_to_ranks:
            self._to_forget.append(request.id)
        request.num_sent_tokens = 0
        request.num_sent_blocks = 0


def _turn(request: Request) -> tuple[int, int]:
    return request.turn


def _introduced(request: Request) -> NewRequest:
    return NewRequest(
        request_id=request.id,
        token_ids=tuple(request.token_ids[request.num_computed :]),  # more than none only of a fork
        block_ids=tuple(request.block_ids),
        sampling=request.sampling,
        num_output_tokens=request.num_output_tokens,
        fork_of=request.fork_of,
        num_computed=request.num_computed,
    )
