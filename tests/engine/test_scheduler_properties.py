"""Arrivals, aborts and steps in any order: no block is lost, all end once, with the tokens of a solo run."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dist_infer.engine.fake_executor import FakeExecutor
from dist_infer.engine.request import Request, RequestState
from dist_infer.engine.scheduler import Scheduler, SchedulerConfig
from dist_infer.messages import StepPlan
from dist_infer.sampling_params import SamplingParams
from partition.errors import ConfigError

VOCAB = 200
EOS = 0
HASH = FakeExecutor(num_kv_blocks=1, block_tokens=1, vocab_size=VOCAB).hashed_token


@functools.cache
def solo_run(prompt: tuple[int, ...], limit: int, params: SamplingParams) -> list[int]:
    """The answer of a request that is alone in the world."""
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(HASH(tokens, params.spec(params.seed or 0)))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class SchedulerMachine(RuleBasedStateMachine):
    scheduler: Scheduler

    @initialize(
        num_kv_blocks=st.integers(3, 10),
        block_tokens=st.integers(1, 3),
        max_batch_tokens=st.integers(1, 6),
        max_micro_batches=st.integers(1, 3),
        max_requests=st.integers(2, 8),
        max_steps_in_flight=st.integers(1, 4),
        has_rings=st.booleans(),
    )
    def build(self, **config: Any) -> None:
        self.config = SchedulerConfig(max_model_len=40, **config)
        self.scheduler = Scheduler(self.config)
        self.start_ranks()
        self.live: dict[str, Request] = {}
        self.in_flight: list[StepPlan] = []
        self.num_added = 0

    def start_ranks(self) -> None:
        self.executor = FakeExecutor(
            num_kv_blocks=self.config.num_kv_blocks,
            block_tokens=self.config.block_tokens,
            vocab_size=VOCAB,
            max_batch_tokens=self.config.max_batch_tokens,
        )

    @rule(
        num_prompt=st.integers(1, 12),
        max_tokens=st.integers(1, 20),
        seed=st.integers(0, 3),
        greedy=st.booleans(),
        priority=st.integers(-1, 1),
    )
    def arrive(self, num_prompt: int, max_tokens: int, seed: int, greedy: bool, priority: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0 if greedy else 1, seed=seed)
        prompt = tuple(1 + (7 * self.num_added + index) % (VOCAB - 1) for index in range(num_prompt))  # no two alike
        name = f"r{self.num_added}"
        request = Request(
            id=name, prompt_token_ids=prompt, params=params, sampling=params.spec(seed), priority=priority
        )
        try:
            self.scheduler.add(request)
        except ConfigError:
            room = self.config.num_kv_blocks * self.config.block_tokens
            assert min(num_prompt + max_tokens, self.config.max_model_len) > room or num_prompt >= (
                self.config.max_model_len
            )
            return
        self.live[name] = request
        self.num_added += 1

    @rule(
        num_prompt=st.integers(1, 12),
        max_tokens=st.integers(1, 12),
        num_answers=st.integers(2, 5),
        priority=st.integers(-1, 1),
    )
    def arrive_as_a_family(self, num_prompt: int, max_tokens: int, num_answers: int, priority: int) -> None:
        """Several answers to one prompt: they share what they can, and each is that of its solo run."""
        first = self.num_added
        prompt = tuple(1 + (7 * first + index) % (VOCAB - 1) for index in range(num_prompt))
        params = [SamplingParams(max_tokens=max_tokens, temperature=1, seed=seed) for seed in range(num_answers)]
        family = [
            Request(
                id=f"r{first + index}",
                prompt_token_ids=prompt,
                params=own,
                sampling=own.spec(index),
                priority=priority,
            )
            for index, own in enumerate(params)
        ]
        for request in family:
            request.siblings = tuple(family)
        for request in family:
            try:
                self.scheduler.add(request)
            except ConfigError:
                return
            self.live[request.id] = request
            self.num_added += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.scheduler.abort(name)
        request = self.live.pop(name)
        expected = solo_run(request.prompt_token_ids, request.token_limit, request.params)
        assert request.output_token_ids == expected[: request.num_output_tokens]

    @rule()
    def step(self) -> None:
        """The executor checks the plan like a rank: order, known requests, blocks, no request in two steps.

        Nobody is let in before one who is more urgent and could have been, nor thrown out for one who is less.
        """
        ready = [request for request in self.live.values() if request.is_ready]
        plan = self.scheduler.schedule()
        preempted = [request.turn for request in ready if request.state is RequestState.WAITING]
        kept = [request.turn for request in ready if request.state is RequestState.RUNNING]
        assert not preempted or not kept or max(kept) < min(preempted)
        if plan is None:
            return
        waiting = [request for request in self.live.values() if request.state is RequestState.WAITING]
        passed_over = [request.turn for request in waiting if not request.siblings]
        assert all(self.live[new.request_id].turn < turn for new in plan.new for turn in passed_over)
        assert len(plan.micro_batches) <= self.config.max_micro_batches
        assert 0 < plan.num_tokens <= self.config.step_tokens
        self.executor.submit(plan)
        self.in_flight.append(plan)
        assert len(self.in_flight) <= self.config.max_steps_in_flight

    @precondition(lambda self: self.in_flight)
    @rule()
    def collect(self) -> None:
        self.in_flight.pop(0)
        for request, token in self.scheduler.apply(self.executor.collect(1.0)):
            assert request.id in self.live, "a token of a request that has ended"
            if token.token_id == EOS or request.num_tokens == request.token_limit:
                self.scheduler.finish(request)
                del self.live[request.id]
                expected = solo_run(request.prompt_token_ids, request.token_limit, request.params)
                assert request.output_token_ids == expected

    @rule()
    def lose_the_ranks(self) -> None:
        """With whatever is in flight; the ones that come know nothing, and every answer goes on where it was."""
        before = {name: list(request.token_ids) for name, request in self.live.items()}
        assert self.scheduler.rewind() == []
        assert {name: request.token_ids for name, request in self.live.items()} == before
        assert all(request.state is RequestState.WAITING for request in self.live.values())
        assert self.scheduler.num_free_blocks == self.config.num_kv_blocks
        self.in_flight.clear()
        self.start_ranks()

    @rule(
        num_kv_blocks=st.integers(3, 10),
        block_tokens=st.integers(1, 3),
        max_requests=st.integers(1, 8),
        max_model_len=st.integers(8, 40),
    )
    def lose_the_ranks_for_others(self, **changes: int) -> None:
        """Whoever cannot be finished by the new ones is given back, with what it had so far, and nobody else."""
        self.config = replace(self.config, **changes)
        misfits = {request.id for request in self.scheduler.rewind(self.config)}
        most = min(self.config.max_model_len, self.config.num_kv_blocks * self.config.block_tokens)
        assert misfits == {name for name, request in self.live.items() if request.token_limit > most}
        for name in misfits:
            assert self.live.pop(name).state is RequestState.FINISHED
        self.in_flight.clear()
        self.start_ranks()

    @rule(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(4, 8)), min_size=2, max_size=5))
    def arrive_together(self, sizes: list[tuple[int, int]]) -> None:
        """Short prompts, longer answers: all are let in, not all can stay."""
        for num_prompt, max_tokens in sizes:
            self.arrive(num_prompt, max_tokens, seed=1, greedy=True, priority=num_prompt % 2)

    @precondition(lambda self: self.live)
    @rule(num_rounds=st.integers(2, 8))
    def run_on(self, num_rounds: int) -> None:
        """Far enough for blocks to run out."""
        for _ in range(num_rounds):
            self.step()
            if self.in_flight:
                self.collect()

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.integrity()
        assert self.scheduler.num_running <= self.config.max_requests
        if not self.in_flight:
            assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.live)

    def teardown(self) -> None:
        """Whatever happened before, all that live come to their end in a bounded number of steps."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            plan = self.scheduler.schedule()
            if plan is not None:
                self.executor.submit(plan)
                self.in_flight.append(plan)
            elif self.in_flight:
                self.collect()
            else:
                break
        assert not self.live
        assert not self.scheduler.has_requests
        assert self.scheduler.num_free_blocks == self.config.num_kv_blocks
        self.scheduler.integrity()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
