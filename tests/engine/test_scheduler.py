"""What goes into a step, in which order, and what a full KV cache does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dist_infer.engine.fake_executor import FakeExecutor
from dist_infer.engine.request import Request, RequestState
from dist_infer.engine.scheduler import Scheduler, SchedulerConfig
from dist_infer.messages import Chunk, NewRequest, SampledToken, SamplingSpec, StepPlan, StepResult
from dist_infer.sampling_params import SamplingParams
from partition.errors import ClusterError, ConfigError, WorkerError


def make_scheduler(**changes: int) -> Scheduler:
    values = {
        "num_kv_blocks": 100,
        "block_tokens": 4,
        "max_batch_tokens": 8,
        "max_micro_batches": 2,
        "max_requests": 10,
        "max_model_len": 200,
        "max_steps_in_flight": 1,
    }
    return Scheduler(SchedulerConfig(**{**values, **changes}))


def make_request(name: str, num_prompt: int, max_tokens: int | None = 4, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    prompt = tuple(range(num_prompt))
    return Request(id=name, prompt_token_ids=prompt, params=params, sampling=params.spec(0), priority=priority)


def answer(scheduler: Scheduler, plan: StepPlan | None) -> None:
    """Every sampled token is 7."""
    assert plan is not None
    chunks = [chunk for batch in plan.micro_batches for chunk in batch]
    tokens = tuple(SampledToken(chunk.request_id, 7) for chunk in chunks if chunk.sample)
    scheduler.apply(StepResult(plan.step_id, tokens))


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    answer(scheduler, plan)
    return plan


def names(plan: StepPlan | None) -> list[str]:
    assert plan is not None
    return list(dict.fromkeys(chunk.request_id for batch in plan.micro_batches for chunk in batch))


def test_long_prompt_fills_the_micro_batches_of_one_step_then_goes_on() -> None:
    """Layer-major prefill: a prompt costs one pass for each step's budget, not one for each micro-batch."""
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 20))
    first, second = step(scheduler), step(scheduler)
    assert first.micro_batches == ((Chunk("a", 0, 8, False),), (Chunk("a", 8, 8, False),))
    assert second.micro_batches == ((Chunk("a", 16, 4, True),),)
    assert (second.new, second.diffs) == ((), ())  # the ranks know all of it


def test_a_chunk_is_cut_where_its_micro_batch_ends() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    scheduler.add(make_request("b", 6))
    assert step(scheduler).micro_batches == (
        (Chunk("a", 0, 5, True), Chunk("b", 0, 3, False)),
        (Chunk("b", 3, 3, True),),
    )


def test_decodes_behind_a_long_prompt_keep_their_token() -> None:
    """A prompt that takes the whole budget would stall every younger answer that is being read."""
    scheduler = make_scheduler(max_steps_in_flight=2)
    scheduler.add(make_request("long", 100))
    scheduler.add(make_request("short", 2))
    scheduler.add(make_request("other", 2))
    prompt, decode = scheduler.schedule(), scheduler.schedule()
    assert (names(prompt), names(decode)) == (["long"], ["short", "other"])
    answer(scheduler, prompt)
    answer(scheduler, decode)
    plan = scheduler.schedule()
    assert plan is not None
    assert (names(plan), plan.num_tokens) == (["long", "short"], 16)


def test_prompts_behind_decodes_take_what_is_left() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("old", 2))
    step(scheduler)
    scheduler.add(make_request("long", 40))
    plan = step(scheduler)
    assert (names(plan), plan.num_tokens) == (["old", "long"], 16)


def test_full_once_then_diffs_with_content() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3))
    first, second, third = step(scheduler), step(scheduler), step(scheduler)
    assert [new.token_ids for new in first.new] == [(0, 1, 2)]
    assert second.new == third.new == ()
    assert (second.diffs[0].new_token_ids, second.diffs[0].new_block_ids) == ((7,), ())
    assert (third.diffs[0].new_token_ids, third.diffs[0].new_block_ids) == ((7,), (1,))


def test_end_is_told_to_the_ranks_once_and_only_if_they_knew() -> None:
    scheduler = make_scheduler(max_requests=1)
    known, unknown, last = make_request("known", 2), make_request("unknown", 2), make_request("last", 2)
    for request in (known, unknown, last):
        scheduler.add(request)
    step(scheduler)
    scheduler.finish(known)
    scheduler.abort("unknown")
    plan = step(scheduler)
    assert plan.finished == ("known",)
    assert names(plan) == ["last"]
    assert step(scheduler).finished == ()


def test_max_requests_own_blocks_at_most() -> None:
    scheduler = make_scheduler(max_requests=2)
    for name in "abc":
        scheduler.add(make_request(name, 2))
    assert names(step(scheduler)) == ["a", "b"]
    assert names(step(scheduler)) == ["a", "b"]


def test_running_requests_are_split_over_the_steps_in_flight() -> None:
    """All in one step would leave the other stages of the pipeline idle."""
    scheduler = make_scheduler(max_steps_in_flight=2)
    for name in "abcd":
        scheduler.add(make_request(name, 2))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (names(first), names(second)) == (["a", "b"], ["c", "d"])
    assert scheduler.schedule() is None
    answer(scheduler, first)
    assert names(scheduler.schedule()) == ["a", "b"]


def test_waiting_requests_that_find_no_block_do_not_unsplit_the_steps() -> None:
    scheduler = make_scheduler(max_steps_in_flight=2, num_kv_blocks=6, max_requests=50)
    for index in range(20):
        scheduler.add(make_request(f"r{index}", 4, max_tokens=2))
    first, second = scheduler.schedule(), scheduler.schedule()
    running = names(first) + (names(second) if second is not None else [])
    answer(scheduler, first)
    assert len(names(scheduler.schedule())) <= -(-len(running) // 2)


def test_admission_leaves_a_block_for_each_running_request() -> None:
    """Else the newcomer's prompt is computed, thrown away at the next token of an older one, and computed again."""
    scheduler = make_scheduler(num_kv_blocks=3)
    scheduler.add(make_request("a", 4))
    scheduler.add(make_request("b", 8))
    assert names(step(scheduler)) == ["a"]
    assert names(step(scheduler)) == ["a"]
    assert scheduler.num_preemptions == 0


def test_youngest_is_preempted_and_comes_back_in_full() -> None:
    scheduler = make_scheduler(num_kv_blocks=4)
    old, young = make_request("old", 4, max_tokens=9), make_request("young", 4, max_tokens=9)
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(20):
        plan = scheduler.schedule()
        assert plan is not None
        if young.num_preemptions:
            break
        answer(scheduler, plan)
    assert plan.finished == ("young",)
    assert (names(plan), young.state, young.num_computed) == (["old"], RequestState.WAITING, 0)
    answer(scheduler, plan)
    scheduler.finish(old)
    plan = step(scheduler)
    assert plan.new[0].token_ids == tuple(young.token_ids[:-1])
    assert plan.finished == ("old",)


def test_oldest_is_never_preempted_and_waits_for_a_younger_one_in_flight() -> None:
    """Two steps: the oldest needs a block while all younger ones are in flight. It must neither give up its own
    blocks nor be passed over once they are back.
    """
    scheduler = make_scheduler(num_kv_blocks=4, max_steps_in_flight=2)
    old, young = make_request("old", 4, max_tokens=9), make_request("young", 4, max_tokens=9)
    scheduler.add(old)
    scheduler.add(young)
    in_flight: list[StepPlan] = []
    for _ in range(40):
        while (plan := scheduler.schedule()) is not None:
            in_flight.append(plan)
        assert in_flight, "livelock"
        answer(scheduler, in_flight.pop(0))
        scheduler.integrity()
        if old.num_output_tokens == 9:
            break
    assert (old.num_output_tokens, old.num_preemptions) == (9, 0)
    assert young.num_preemptions > 0


def test_blocks_of_a_request_aborted_in_flight_stay_its_own_until_the_step_is_back() -> None:
    """The ranks still write into them; handed on at once, they would hold another's text."""
    scheduler = make_scheduler()
    request = make_request("a", 4)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abort("a")
    assert (request.state, scheduler.num_free_blocks) == (RequestState.ABORTING, 99)
    answer(scheduler, plan)
    assert (request.state, scheduler.num_free_blocks, scheduler.has_requests) == (RequestState.FINISHED, 100, False)


def test_finish_in_flight_is_a_bug() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4)
    scheduler.add(request)
    scheduler.schedule()
    with pytest.raises(RuntimeError, match="in flight"):
        scheduler.finish(request)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "message"),
    [
        (0, 1, "no tokens"),
        (200, 1, "201 together, but max_model_len is 200"),
        (10, 31, "need 11 KV blocks of 4 tokens, but there are 10"),
        (40, None, "need 11 KV blocks of 4 tokens, but there are 10"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(num_prompt: int, max_tokens: int | None, message: str) -> None:
    """Else its client waits for ever. The message has need and have."""
    scheduler = make_scheduler(num_kv_blocks=10)
    with pytest.raises(ConfigError, match=message):
        scheduler.add(make_request("a", num_prompt, max_tokens))
    assert not scheduler.has_requests


@pytest.mark.parametrize(
    ("changes", "max_tokens", "limit"),
    [({}, 5, 15), ({}, 500, 200), ({}, None, 200), ({"num_kv_blocks": 10}, None, 40)],
)
def test_token_limit_is_the_nearest_end(changes: dict[str, int], max_tokens: int | None, limit: int) -> None:
    assert make_scheduler(**changes).token_limit(10, max_tokens) == limit


def test_id_in_use_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 2))
    with pytest.raises(ConfigError, match="in use"):
        scheduler.add(make_request("a", 2))


@pytest.mark.parametrize(
    "result",
    [
        StepResult(1, (SampledToken("a", 7),)),
        StepResult(0, ()),
        StepResult(0, (SampledToken("b", 7),)),
        StepResult(0, (SampledToken("a", 7), SampledToken("a", 8))),
    ],
)
def test_result_of_another_step_or_request_is_never_taken_in(result: StepResult) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 2))
    scheduler.schedule()
    with pytest.raises(ClusterError, match="step"):
        scheduler.apply(result)


@pytest.mark.parametrize("field", ["num_kv_blocks", "max_batch_tokens", "max_steps_in_flight"])
def test_config_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        make_scheduler(**{field: 0})


def test_integrity_sees_a_block_the_request_does_not_know() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 2))
    scheduler.schedule()
    scheduler._requests["a"].block_ids.clear()
    with pytest.raises(RuntimeError, match="owned"):
        scheduler.integrity()


def corrupt(plan: StepPlan, **changes: Any) -> StepPlan:
    values = {name: getattr(plan, name) for name in ("step_id", "micro_batches", "new", "diffs", "finished")}
    return StepPlan(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_id": 3}, "step 1 is next"),
        ({"finished": ("x",)}, "not known"),
        ({"finished": ("a",)}, "not known or not in the step"),
        ({"diffs": ()}, "3 tokens computed and 3 known"),
        ({"micro_batches": ((Chunk("x", 0, 1, True),),)}, "not in the step|not known"),
        ({"micro_batches": ((Chunk("a", 2, 1, True),),)}, "tokens computed"),
        ({"micro_batches": ((Chunk("a", 3, 1, False),),)}, "must sample"),
        ({"micro_batches": ((),), "diffs": ()}, "micro-batch of 0"),
    ],
)
def test_fake_executor_refuses_what_a_rank_would(changes: dict[str, Any], message: str) -> None:
    """If the fake forgave, every test that rests on it would prove nothing."""
    scheduler = make_scheduler()
    executor = FakeExecutor(num_kv_blocks=100, block_tokens=4)
    scheduler.add(make_request("a", 3))
    first = scheduler.schedule()
    assert first is not None
    executor.submit(first)
    scheduler.apply(executor.collect(1.0))
    second = scheduler.schedule()
    assert second is not None
    with pytest.raises(ClusterError, match=message):
        executor.submit(corrupt(second, **changes))


# ---- priority


def test_the_most_urgent_is_let_in_first_and_equals_in_their_order() -> None:
    scheduler = make_scheduler(max_requests=1)
    urgency = {"a": 0, "b": 1, "c": -3, "d": 0}
    requests = {name: make_request(name, 2, max_tokens=1, priority=priority) for name, priority in urgency.items()}
    for request in requests.values():
        scheduler.add(request)
    order = []
    while scheduler.has_requests:
        (name,) = names(step(scheduler))
        order.append(name)
        scheduler.finish(requests[name])
    assert order == ["c", "a", "d", "b"]


def test_the_least_urgent_is_preempted_even_if_it_is_the_oldest() -> None:
    scheduler = make_scheduler(num_kv_blocks=6)
    old = make_request("old", 4, max_tokens=9, priority=1)
    urgent, young = make_request("urgent", 4, max_tokens=9, priority=-1), make_request("young", 4, max_tokens=9)
    for request in (old, urgent, young):
        scheduler.add(request)
    while old.num_preemptions == 0:
        step(scheduler)
        scheduler.integrity()
    assert (urgent.num_preemptions, young.num_preemptions) == (0, 0)
    assert names(step(scheduler)) == ["urgent", "young"]
    assert old.state is RequestState.WAITING


def test_a_preempted_request_waits_behind_who_is_more_urgent() -> None:
    scheduler = make_scheduler(num_kv_blocks=4)
    first, second = make_request("first", 4, max_tokens=9), make_request("second", 4, max_tokens=9)
    scheduler.add(first)
    scheduler.add(second)
    while second.num_preemptions == 0:
        step(scheduler)
    scheduler.add(make_request("urgent", 4, priority=-1))
    scheduler.add(make_request("late", 4))
    assert [request.id for request in scheduler._waiting] == ["urgent", "second", "late"]


# ---- several answers to one prompt


def make_family(num_answers: int, num_prompt: int, max_tokens: int = 4) -> list[Request]:
    family = [make_request(f"a{index}", num_prompt, max_tokens) for index in range(num_answers)]
    for request in family:
        request.siblings = tuple(family)
    return family


def computed(plan: StepPlan) -> dict[str, int]:
    found: dict[str, int] = {}
    for chunk in (chunk for batch in plan.micro_batches for chunk in batch):
        found[chunk.request_id] = found.get(chunk.request_id, 0) + chunk.num_tokens
    return found


def test_a_prompt_is_computed_once_for_all_its_answers() -> None:
    """21 tokens: 5 full blocks are shared, the 20 tokens before the last are taken over, that one gives the logits."""
    scheduler = make_scheduler()
    for request in make_family(3, 21):
        scheduler.add(request)
    plans = [step(scheduler) for _ in range(3)]
    assert [computed(plan) for plan in plans] == [{"a0": 16}, {"a0": 5}, {"a0": 1, "a1": 1, "a2": 1}]
    for new in plans[2].new:
        assert (new.fork_of, new.num_computed, new.num_output_tokens) == ("a0", 20, 0)
        assert new.token_ids == (20,)  # the others are known: 128 answers would send a long prompt 128 times
        assert new.block_ids[:5] == plans[0].new[0].block_ids[:5]
    blocks = [new.block_ids[5] for new in plans[2].new] + [plans[0].new[0].block_ids[5]]
    assert len(set(blocks)) == 3
    assert scheduler.num_free_blocks == 100 - 5 - 3
    scheduler.integrity()


def test_whoever_is_behind_a_waiting_sibling_goes_first() -> None:
    scheduler = make_scheduler(max_batch_tokens=4, max_micro_batches=2)
    for request in make_family(2, 10):
        scheduler.add(request)
    scheduler.add(make_request("other", 2))
    assert computed(step(scheduler)) == {"a0": 8}
    assert computed(step(scheduler)) == {"a0": 2, "other": 2}
    assert computed(step(scheduler)) == {"a0": 1, "other": 1, "a1": 1}


def test_an_answer_whose_siblings_are_gone_computes_the_prompt_itself() -> None:
    scheduler = make_scheduler(max_requests=1)
    first, second, third = make_family(3, 6)
    for request in (first, second, third):
        scheduler.add(request)
    step(scheduler)
    scheduler.finish(first)
    plan = step(scheduler)
    assert computed(plan) == {"a1": 6}
    assert plan.new[0].fork_of is None
    scheduler.abort("a1")
    assert computed(step(scheduler)) == {"a2": 6}


def test_a_preempted_answer_is_put_back_with_what_it_has() -> None:
    """Blocks run out: the youngest goes, and comes back as a fork of one that is still there, or alone."""
    scheduler = make_scheduler(num_kv_blocks=7, block_tokens=2, max_batch_tokens=20)
    family = make_family(2, 5, max_tokens=9)
    for request in family:
        scheduler.add(request)
    while family[1].num_preemptions == 0:
        step(scheduler)
        scheduler.integrity()
    num_outputs = family[1].num_output_tokens
    assert num_outputs > 0
    while family[0].num_tokens < family[0].token_limit:
        step(scheduler)
    scheduler.finish(family[0])
    (new,) = step(scheduler).new
    assert (new.request_id, new.num_output_tokens, new.fork_of) == ("a1", num_outputs, None)


def test_an_origin_that_went_on_far_is_none() -> None:
    """Layers that keep a window may have overwritten the prompt by then: the answer computes it itself."""
    scheduler = make_scheduler(max_batch_tokens=4, max_micro_batches=2, max_requests=2)
    family = make_family(3, 6, max_tokens=20)
    for request in family:
        scheduler.add(request)
    for _ in range(7):
        step(scheduler)
    scheduler.finish(family[1])
    assert family[0].num_output_tokens > 4
    assert computed(step(scheduler)) == {"a0": 1, "a2": 6}


def test_without_rings_an_origin_may_be_as_far_as_it_likes() -> None:
    """Blocks keep the prompt: to compute it again for each answer that comes late was waste."""
    scheduler = make_scheduler(max_batch_tokens=4, max_micro_batches=2, max_requests=2, has_rings=False)
    family = make_family(3, 6, max_tokens=20)
    for request in family:
        scheduler.add(request)
    for _ in range(7):
        step(scheduler)
    scheduler.finish(family[1])
    assert family[0].num_output_tokens > 4
    assert computed(step(scheduler)) == {"a0": 1, "a2": 1}


class Counted(tuple[Request, ...]):
    """Siblings that count how often somebody goes through them."""

    num_walks = 0

    def __iter__(self) -> Iterator[Request]:
        Counted.num_walks += 1
        return super().__iter__()


def test_a_family_is_looked_at_once_a_step_not_once_by_each_of_it() -> None:
    """64 prompts of 128 answers took 110 ms a step."""
    scheduler = make_scheduler(num_kv_blocks=1000, max_requests=1000, max_batch_tokens=40)
    for number in range(5):
        family = [make_request(f"{number}.{index}", 6) for index in range(20)]
        for request in family:
            request.siblings = Counted(family)
            scheduler.add(request)
    for num_steps in range(1, 8):
        step(scheduler)
        assert Counted.num_walks <= 5 * num_steps
    assert scheduler.num_running > 50


def test_a_prompt_of_one_token_has_nothing_to_share() -> None:
    scheduler = make_scheduler()
    for request in make_family(2, 1):
        scheduler.add(request)
    assert computed(step(scheduler)) == {"a0": 1, "a1": 1}


def test_caches_that_cannot_be_taken_over_are_not() -> None:
    """Recurrent states know no position to go back to: each answer computes the prompt."""
    scheduler = make_scheduler(shares_prompts=False)
    for request in make_family(2, 6):
        scheduler.add(request)
    assert computed(step(scheduler)) == {"a0": 6, "a1": 6}


def test_ranks_refuse_a_fork_of_what_they_do_not_know() -> None:
    executor = FakeExecutor(num_kv_blocks=4, block_tokens=2)
    new = NewRequest("b", (1, 2, 3), (0, 1), SamplingSpec(), fork_of="a", num_computed=2)
    with pytest.raises(WorkerError, match="is a fork of 'a', not known that far"):
        executor.submit(StepPlan(0, ((Chunk("b", 2, 1, True),),), new=(new,)))
