"""What a rank keeps of the running requests: where their KV rows lie, and that a plan which does not fit is noticed."""

from __future__ import annotations

import pytest
import torch

from dist_infer.messages import Chunk, NewRequest, RequestDiff, SamplingSpec, StepPlan
from dist_infer.worker.request_table import ForkCopies, MicroBatch, RequestTable

CPU = torch.device("cpu")
BLOCK = 4


def table() -> RequestTable:
    return RequestTable(BLOCK, 10, CPU)


def new(name: str, num_tokens: int, *blocks: int, first: int = 100) -> NewRequest:
    return NewRequest(name, tuple(range(first, first + num_tokens)), blocks, SamplingSpec(seed=num_tokens))


def plan(step: int, *chunks: Chunk, **rest: tuple) -> StepPlan:
    return StepPlan(step, (chunks,), **rest)


def run(found: RequestTable, step: StepPlan) -> MicroBatch:
    found.apply(step)
    (batch,) = [found.micro_batch(chunks) for chunks in step.micro_batches]
    return batch


def test_consecutive_blocks_are_a_view() -> None:
    batch = run(table(), plan(0, Chunk("a", 0, 6, True), new=(new("a", 6, 3, 4),)))
    (span,) = batch.view.spans
    assert span.positions == slice(12, 18)
    assert batch.view.write_positions.tolist() == list(range(12, 18))
    assert batch.token_ids.tolist() == [[100, 101, 102, 103, 104, 105]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert (batch.sample_rows.tolist(), batch.sample_requests) == ([5], ("a",))


def test_scattered_blocks_are_gathered_by_index() -> None:
    """Descending neighbours (5, 4) are not consecutive either."""
    for blocks, rows in [((7, 2), [28, 29, 30, 31, 8, 9]), ((5, 4), [20, 21, 22, 23, 16, 17])]:
        batch = run(table(), plan(0, Chunk("a", 0, 6, True), new=(new("a", 6, *blocks),)))
        (span,) = batch.view.spans
        assert isinstance(span.positions, torch.Tensor)
        assert span.positions.tolist() == rows
        assert batch.view.write_positions.tolist() == rows


def test_a_later_chunk_writes_its_own_rows_and_sees_all() -> None:
    for blocks, rows in [((0, 1), range(8)), ((0, 2), [0, 1, 2, 3, 8, 9, 10, 11])]:
        found = table()
        run(found, plan(0, Chunk("a", 0, 3, False), new=(new("a", 8, *blocks),)))
        batch = run(found, plan(1, Chunk("a", 3, 5, True)))
        assert batch.view.write_positions.tolist() == list(rows)[3:]
        assert batch.position_ids.tolist() == [[3, 4, 5, 6, 7]]
        (span,) = batch.view.spans
        assert (span.first, span.end, span.length) == (0, 5, 8)


def test_several_chunks_of_one_prompt_in_one_step() -> None:
    """Micro-batches of one step follow each other in every unit: the second sees what the first has written."""
    found = table()
    step = StepPlan(
        0,
        ((Chunk("a", 0, 4, False),), (Chunk("a", 4, 2, True), Chunk("b", 0, 2, True))),
        new=(new("a", 6, 0, 1), new("b", 2, 5)),
    )
    found.apply(step)
    first, second = (found.micro_batch(chunks) for chunks in step.micro_batches)
    assert first.view.spans[0].length == 4
    assert [span.length for span in second.view.spans] == [6, 2]
    assert [(span.first, span.end) for span in second.view.spans] == [(0, 2), (2, 4)]
    assert second.view.write_positions.tolist() == [4, 5, 20, 21]
    assert first.sample_rows.tolist() == []
    assert (second.sample_rows.tolist(), second.sample_requests) == ([1, 3], ("a", "b"))


def test_diffs_append_tokens_and_blocks() -> None:
    found = table()
    run(found, plan(0, Chunk("a", 0, 4, True), new=(new("a", 4, 0),)))
    batch = run(found, plan(1, Chunk("a", 4, 1, True), diffs=(RequestDiff("a", (42,), (1,)),)))
    assert batch.token_ids.tolist() == [[42]]
    assert batch.view.spans[0].positions == slice(0, 5)
    batch = run(found, plan(2, Chunk("a", 5, 1, True), diffs=(RequestDiff("a", (43,), (9,)),)))
    assert batch.view.spans[0].positions.tolist() == [0, 1, 2, 3, 4, 5]  # no longer consecutive
    assert found.sampling("a") == (SamplingSpec(seed=4), 6)


def test_a_finished_request_may_come_again_in_the_same_step() -> None:
    """That is what a preemption looks like: nothing of the old blocks or of the progress may survive."""
    found = table()
    run(found, plan(0, Chunk("a", 0, 4, True), new=(new("a", 4, 0),)))
    batch = run(found, plan(1, Chunk("a", 0, 5, True), new=(new("a", 5, 6, 7, first=50),), finished=("a",)))
    assert batch.token_ids.tolist() == [[50, 51, 52, 53, 54]]
    assert batch.view.spans[0].positions == slice(24, 29)
    assert len(found) == 1
    found.apply(StepPlan(2, (), finished=("a", "never-seen")))
    assert len(found) == 0


def test_a_request_has_the_smallest_ring_that_is_free_until_it_goes() -> None:
    """The rule is the same on every rank, so that a request's rows are in one ring everywhere."""
    found = RequestTable(BLOCK, 10, CPU, num_slots=3)
    found.apply(StepPlan(0, (), new=(new("a", 6, 0, 1), new("b", 2, 2), new("c", 2, 3))))
    with pytest.raises(RuntimeError, match="request d: all 3 KV rings are in use"):
        found.apply(StepPlan(1, (), new=(new("d", 2, 4),)))
    found = RequestTable(BLOCK, 10, CPU, num_slots=3)
    found.apply(StepPlan(0, (), new=(new("a", 6, 0, 1), new("b", 2, 2), new("c", 2, 3))))
    batch = run(found, plan(1, Chunk("c", 0, 2, True), Chunk("a", 0, 6, True)))
    assert [span.slot for span in batch.view.spans] == [2, 0]
    assert batch.view.ring_places is not None
    assert batch.view.ring_places.tolist() == [[2] * 2 + [0] * 6, [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch.view.write_rows(10).tolist() == [20, 21, 0, 1, 2, 3, 4, 5]
    # a preempted request begins again, in the ring that is free by then
    batch = run(found, plan(2, Chunk("a", 0, 6, True), new=(new("d", 2, 4), new("a", 6, 0, 1)), finished=("c", "a")))
    assert [span.slot for span in batch.view.spans] == [2]
    batch = run(found, plan(3, Chunk("d", 0, 2, True)))
    assert [span.slot for span in batch.view.spans] == [0]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (plan(1, Chunk("a", 3, 1, True)), r"chunk \[3, 4\) of 4 tokens, 2 computed"),
        (plan(1, Chunk("a", 0, 1, True)), "2 computed"),
        (plan(1, Chunk("a", 2, 3, True)), r"\[2, 5\) of 4 tokens"),
        (plan(1, new=(new("b", 1, 10),)), "KV block 10 of 10"),
        (plan(1, new=(new("b", 1, -1),)), "KV block -1 of 10"),
        (plan(1, diffs=(RequestDiff("a", (), (99,)),)), "KV block 99 of 10"),
        (plan(1, Chunk("b", 0, 5, True), new=(new("b", 5, 1),)), "5 tokens in 1 KV blocks of 4"),
        (plan(1, new=(new("a", 1, 1),)), "request a is already running"),
        (plan(0), "step 0 after step 0"),
        (plan(2), "step 2 after step 0"),
    ],
)
def test_a_plan_that_does_not_follow_is_an_error(step: StepPlan, message: str) -> None:
    """A rank that went on would compute on rows of another request."""
    found = table()
    run(found, plan(0, Chunk("a", 0, 2, False), new=(new("a", 4, 0),)))
    with pytest.raises(RuntimeError, match=message):
        run(found, step)


def test_the_first_step_may_have_any_number() -> None:
    found = table()
    found.apply(StepPlan(7, ()))
    found.apply(StepPlan(8, ()))
    with pytest.raises(RuntimeError, match="step 10 after step 8"):
        found.apply(StepPlan(10, ()))


def fork(name: str, origin: str, num_tokens: int, num_computed: int, *blocks: int) -> NewRequest:
    own = tuple(range(100 + num_computed, 100 + num_tokens))  # the others are the origin's
    return NewRequest(name, own, blocks, SamplingSpec(), fork_of=origin, num_computed=num_computed)


def test_a_fork_copies_the_rows_of_a_block_that_is_not_full() -> None:
    """Tokens 0-3 lie in the shared block 2, tokens 4 and 5 in each one's own."""
    found = table()
    run(found, plan(0, Chunk("a", 0, 7, True), new=(new("a", 7, 2, 3),)))
    forked = fork("b", "a", 7, 6, 2, 8)
    batch = run(found, plan(1, Chunk("b", 6, 1, True), new=(forked,)))
    assert found.fork(forked) == ForkCopies((slice(12, 14), slice(32, 34)), None)
    assert (found.token_ids("b"), found.num_prompt_tokens("b")) == (list(range(100, 107)), 7)
    assert batch.token_ids.tolist() == [[106]]
    assert batch.view.write_positions.tolist() == [34]
    assert batch.view.spans[0].positions.tolist() == [8, 9, 10, 11, 32, 33, 34]


def test_a_fork_at_the_border_of_a_block_copies_no_row_and_one_with_rings_a_ring() -> None:
    found = RequestTable(BLOCK, 10, CPU, num_slots=2)
    run(found, plan(0, Chunk("a", 0, 5, True), new=(new("a", 5, 2, 3),)))
    forked = fork("b", "a", 5, 4, 2, 8)
    run(found, plan(1, Chunk("b", 4, 1, True), new=(forked,)))
    assert found.fork(forked) == ForkCopies(None, (0, 1))


@pytest.mark.parametrize(
    ("forked", "message"),
    [
        (fork("b", "gone", 7, 6, 2, 8), "not known that far"),
        (fork("b", "b", 7, 6, 2, 8), "not known that far"),
        (fork("b", "a", 8, 7, 2, 8), "not known that far"),
        (fork("b", "a", 7, 6, 5, 8), "does not share the blocks"),
    ],
)
def test_a_fork_that_cannot_be_is_an_error(forked: NewRequest, message: str) -> None:
    """It would answer from rows of another request, or from rows that nobody has written."""
    found = table()
    run(found, plan(0, Chunk("a", 0, 6, True), new=(new("a", 7, 2, 3),)))

    def take_over() -> None:
        found.apply(plan(1, new=(forked,)))
        found.fork(forked)

    with pytest.raises(RuntimeError, match=message):
        take_over()
