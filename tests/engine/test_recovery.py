"""Ranks that are lost are replaced: every request goes on from what it has, and nobody sees more than a pause."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dist_infer.engine.fake_executor import FakeExecutor
from dist_infer.engine.loop import EngineLoop
from dist_infer.engine.recover import Recovered
from dist_infer.engine.scheduler import Scheduler, SchedulerConfig
from dist_infer.grammar import Grammar
from dist_infer.messages import StepResult
from dist_infer.outputs import Event, Failed, Finished, TokenEvent
from dist_infer.sampling_params import SamplingParams
from dist_infer.vocabulary import Vocabulary
from partition.errors import ClusterError, WorkerError

WAIT_S = 30.0  # a hang is a failure; nothing waits for it otherwise
PROMPTS = [tuple(range(9 * k + 1, 9 * k + 2 + 3 * k)) for k in range(4)]
CONFIG = SchedulerConfig(
    num_kv_blocks=64,
    block_tokens=4,
    max_batch_tokens=8,
    max_micro_batches=2,
    max_requests=32,
    max_model_len=60,
    max_steps_in_flight=2,
)
WORDS = Vocabulary(texts=tuple(map(chr, range(256))), special_ids=())
GRAMMAR = Grammar(kind="regex", text="a+")


class Client:
    """Collects the events of one request, and fails at the second end."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_over = threading.Event()
        self.has_token = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.is_over.is_set(), f"{event} after the end"
        self.events.append(event)
        (self.has_token if isinstance(event, TokenEvent) else self.is_over).set()

    def end(self) -> Finished | Failed:
        assert self.is_over.wait(WAIT_S), "no end came"
        end = self.events[-1]
        assert isinstance(end, Finished | Failed)
        return end

    def answers(self) -> list[list[int]]:
        """All of them, and that the events gave each token of them once."""
        end = self.end()
        assert isinstance(end, Finished), end
        for answer in end.output.outputs:
            events = [event for event in self.events if isinstance(event, TokenEvent) and event.index == answer.index]
            assert [token for event in events for token in event.token_ids] == answer.token_ids
        return [answer.token_ids for answer in end.output.outputs]


class KnowsAll:
    """Grammars that are all good."""

    vocabulary = WORDS

    def check(self, grammar: Grammar) -> None:
        pass


class Gangs:
    """Fake executors one after the other, each with a script of its own; the recovery of a loop over them.

    A script is FakeExecutor's, with the number of its gang's own steps; without one left, gangs run undisturbed.
    `may_go_on`: a recovery waits for it.
    """

    def __init__(self, *scripts: dict[str, int]) -> None:
        self.scripts, self.config = list(scripts), CONFIG
        self.next_config: SchedulerConfig | None = None
        self.made: list[FakeExecutor] = []
        self.errors: list[ClusterError] = []
        self.is_called, self.may_go_on, self.is_cancelled = threading.Event(), threading.Event(), threading.Event()
        self.may_go_on.set()
        self.refusal: Exception | None = None

    def make(self) -> FakeExecutor:
        script = self.scripts.pop(0) if self.scripts else {}
        first = self.made[-1].plans[-1].step_id + 1 if self.made and self.made[-1].plans else 0
        config = self.config
        executor = FakeExecutor(
            num_kv_blocks=config.num_kv_blocks,
            block_tokens=config.block_tokens,
            max_batch_tokens=config.max_batch_tokens,
            epoch=len(self.made),
            **{name: first + step for name, step in script.items()},
        )
        self.made.append(executor)
        return executor

    def __call__(self, error: ClusterError) -> Recovered:
        self.errors.append(error)
        self.made[-1].close()
        self.is_called.set()
        assert self.may_go_on.wait(WAIT_S)
        if self.is_cancelled.is_set():
            raise ClusterError("the run is being closed")
        if self.refusal is not None:
            raise self.refusal
        self.config = self.next_config or self.config
        executor = self.make()
        return Recovered(executor=executor, epoch=len(self.made) - 1, step_timeout_s=WAIT_S, scheduler=self.next_config)

    def cancel(self) -> None:
        self.is_cancelled.set()
        self.may_go_on.set()


@pytest.fixture
def run() -> Iterator[Callable[..., EngineLoop]]:
    """run(gangs): a loop over them, closed at the end."""
    loops: list[EngineLoop] = []

    def start(gangs: Gangs, *, step_timeout_s: float = WAIT_S, recovers: bool = True) -> EngineLoop:
        loop = EngineLoop(
            executor=gangs.make(),
            scheduler=Scheduler(gangs.config),
            decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
            vocab_size=256,
            eos_token_ids=[255],
            step_timeout_s=step_timeout_s,
            encode=lambda text: list(text.encode()),
            grammars=KnowsAll(),
            recover=gangs if recovers else None,
        )
        loops.append(loop)
        loop.start()
        return loop

    yield start
    for loop in loops:
        loop.close()
        assert not loop._thread.is_alive()


def greedy(max_tokens: int = 20, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)


def answers(loop: EngineLoop, params: SamplingParams) -> list[list[list[int]]]:
    """Of all prompts, submitted at once."""
    clients = [Client() for _ in PROMPTS]
    with loop.together():
        for index, (prompt, client) in enumerate(zip(PROMPTS, clients, strict=True)):
            loop.submit(f"r{index}", prompt, None, params, client)
    found = [client.answers() for client in clients]
    loop.integrity()
    return found


KINDS = {
    "greedy": greedy(),
    "seeded": SamplingParams(max_tokens=20, temperature=1, seed=3, ignore_eos=True),
    "several": SamplingParams(max_tokens=12, temperature=1, seed=3, n=3, ignore_eos=True),
    "best of": SamplingParams(max_tokens=12, temperature=1, seed=3, n=2, best_of=3, ignore_eos=True),
    "scored": greedy(prompt_logprobs=1, logprobs=1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost_at", [(0,), (1,), (7,), (3, 2, 5)])
def test_a_loss_at_any_step_changes_no_answer(
    run: Callable[..., EngineLoop], kind: str, lost_at: tuple[int, ...]
) -> None:
    """Guards the replay: nothing given twice, nothing left out, the same draws. lost_at: the last step of each gang."""
    expected = answers(run(Gangs()), KINDS[kind])
    gangs = Gangs(*({"fail_at_step": step} for step in lost_at))
    loop = run(gangs)
    assert answers(loop, KINDS[kind]) == expected
    assert len(gangs.errors) == loop.stats.num_gang_restarts == len(lost_at)
    assert loop.failure is None


def test_prompt_logprobs_are_those_of_an_undisturbed_run(run: Callable[..., EngineLoop]) -> None:
    """Guards the parts that had come before the loss, and those that come twice."""
    found = []
    for script in ({}, {"fail_at_step": 1}):
        client = Client()
        run(Gangs(script)).submit("r", tuple(range(1, 40)), None, greedy(3, prompt_logprobs=2), client)
        end = client.end()
        assert isinstance(end, Finished)
        found.append(end.output.prompt_logprobs)
    assert found[0] == found[1]


def test_new_ranks_are_told_the_vocabulary_again(run: Callable[..., EngineLoop]) -> None:
    """Guards grammars: the first step that needs it brings it, to every gang."""
    gangs = Gangs({"fail_at_step": 4})
    client = Client()
    run(gangs).submit("r", (1, 2), None, greedy(12, grammar=GRAMMAR), client)
    client.answers()
    assert len(gangs.made) == 2
    for executor in gangs.made:
        assert [plan.vocabulary is not None for plan in executor.plans[:2]] == [True, False]
    assert gangs.made[1].plans[0].new[0].num_output_tokens == 4


def test_a_step_that_never_answers_is_a_loss(run: Callable[..., EngineLoop]) -> None:
    gangs = Gangs({"hang_at_step": 2})
    client = Client()
    run(gangs, step_timeout_s=0.05).submit("r", (1, 2), None, greedy(), client)
    assert len(client.answers()[0]) == 20
    assert "within 0.05 s" in str(gangs.errors[0])


def test_a_rank_that_is_lost_while_nobody_asks_is_replaced_at_once(run: Callable[..., EngineLoop]) -> None:
    """Guards the idle engine: the next request finds ranks that are there. One out of use says nothing more."""
    gangs = Gangs()
    loop = run(gangs)
    gangs.made[0].lose()
    assert gangs.is_called.wait(WAIT_S)
    assert len(answers(loop, greedy())) == len(PROMPTS)
    gangs.made[0].lose()
    assert len(answers(loop, greedy())) == len(PROMPTS)
    assert len(gangs.made) == 2


def test_requests_and_aborts_of_the_meantime_wait(run: Callable[..., EngineLoop]) -> None:
    """Guards the inbox: a submission is taken in during a recovery, an abort ends after it, and each once."""
    gangs = Gangs({"fail_at_step": 3})
    gangs.may_go_on.clear()
    loop = run(gangs)
    stays, leaves, comes = Client(), Client(), Client()
    with loop.together():
        loop.submit("stays", PROMPTS[1], None, greedy(), stays)
        loop.submit("leaves", PROMPTS[2], None, greedy(), leaves)
    assert gangs.is_called.wait(WAIT_S)
    num_events = len(stays.events)
    loop.submit("comes", PROMPTS[3], None, greedy(), comes)
    assert loop.abort("leaves")
    assert not comes.is_over.wait(0.05)
    assert len(stays.events) == num_events
    gangs.may_go_on.set()
    assert len(stays.answers()[0]) == len(comes.answers()[0]) == 20
    end = leaves.end()
    assert isinstance(end, Finished)
    assert end.reason == "abort"


def test_close_gives_a_recovery_up(run: Callable[..., EngineLoop]) -> None:
    """Guards `close` against waiting for a start: what lives ends with "abort"."""
    gangs = Gangs({"fail_at_step": 3})
    gangs.may_go_on.clear()
    loop, client = run(gangs), Client()
    loop.submit("r", PROMPTS[0], None, greedy(), client)
    assert gangs.is_called.wait(WAIT_S)
    loop.close(timeout_s=WAIT_S)
    assert gangs.is_cancelled.is_set()
    end = client.end()
    assert isinstance(end, Finished)
    assert end.reason == "abort"
    assert len(gangs.made) == 1


def test_a_loss_after_close_is_not_mended(run: Callable[..., EngineLoop]) -> None:
    gangs = Gangs({"hang_at_step": 0})
    loop, client = run(gangs), Client()
    loop.submit("r", PROMPTS[0], None, greedy(), client)
    loop.close(timeout_s=0.01)
    assert isinstance(client.end(), Finished)
    assert gangs.errors == []


def test_where_there_are_no_others_all_fail_with_both_causes(run: Callable[..., EngineLoop]) -> None:
    gangs = Gangs({"fail_at_step": 2})
    gangs.refusal = ClusterError("no gang is left")
    loop, clients = run(gangs), [Client() for _ in PROMPTS]
    with loop.together():
        for index, client in enumerate(clients):
            loop.submit(f"r{index}", PROMPTS[index], None, greedy(), client)
    for client in clients:
        end = client.end()
        assert isinstance(end, Failed)
        assert "rank 0 failed at step 2" in str(end.error)
        assert "no gang is left" in str(end.error)
    with pytest.raises(ClusterError, match=r"takes no requests: .*no gang is left"):
        loop.submit("late", PROMPTS[0], None, greedy(), Client())


def test_our_own_bugs_are_not_mended(run: Callable[..., EngineLoop], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a bug that ends one gang after the other."""

    def broken(timeout_s: float) -> StepResult:
        raise KeyError("a bug")

    gangs = Gangs()
    loop, client = run(gangs), Client()
    monkeypatch.setattr(gangs.made[0], "collect", broken)
    loop.submit("r", PROMPTS[0], None, greedy(), client)
    assert isinstance(client.end(), Failed)
    assert gangs.errors == []


def test_without_a_recovery_the_first_loss_is_the_last(run: Callable[..., EngineLoop]) -> None:
    """Also while nobody asks for anything."""
    gangs = Gangs()
    loop = run(gangs, recovers=False)
    gangs.made[0].lose()
    loop._thread.join(WAIT_S)
    assert isinstance(loop.failure, WorkerError)


def test_who_has_no_room_in_a_smaller_gang_fails_alone(run: Callable[..., EngineLoop]) -> None:
    """Guards a plan for fewer nodes: what runs and what waits in the inbox alike; neighbours go on."""
    gangs = Gangs({"fail_at_step": 4})
    gangs.may_go_on.clear()
    loop = run(gangs)
    small, large, family, late, open_ended = (Client() for _ in range(5))
    with loop.together():
        loop.submit("small", PROMPTS[1], None, greedy(10), small)
        loop.submit("large", PROMPTS[2], None, greedy(50), large)
        loop.submit("family", PROMPTS[3], None, greedy(40, n=2), family)
        loop.submit("open", PROMPTS[0], None, greedy(None), open_ended)
    assert gangs.is_called.wait(WAIT_S)
    loop.submit("late", tuple(range(1, 40)), None, greedy(5, n=2), late)
    gangs.next_config = SchedulerConfig(**{**vars(CONFIG), "num_kv_blocks": 8, "max_model_len": 30})
    gangs.may_go_on.set()
    assert len(small.answers()[0]) == 10
    assert len(open_ended.answers()[0]) == 30 - len(PROMPTS[0])
    for client in (large, family, late):
        end = client.end()
        assert isinstance(end, Failed)
    assert "have no room for this request" in str(large.events[-1].error)  # type: ignore[union-attr]
    assert loop.failure is None
    loop.integrity()
