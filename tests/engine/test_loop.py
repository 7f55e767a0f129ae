"""The engine's thread: every request ends exactly once, one request's error is its own, nothing hangs."""

from __future__ import annotations

import math
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from dist_infer.counter_random import sample_seed
from dist_infer.engine.answer import Answer
from dist_infer.engine.fake_executor import FakeExecutor
from dist_infer.engine.loop import EngineLoop
from dist_infer.engine.request import Request
from dist_infer.engine.scheduler import Scheduler, SchedulerConfig
from dist_infer.messages import Chunk, PromptLogprobs, SampledToken, SamplingSpec
from dist_infer.outputs import CompletionOutput, Event, Failed, Finished, TokenEvent
from dist_infer.sampling_params import SamplingParams
from partition.errors import ClusterError, ConfigError, DistInferError

EOS = 255
WAIT_S = 30.0  # a hang is a failure; nothing waits for it otherwise
NextToken = Callable[[Sequence[int], SamplingSpec], int]


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def says(text: str) -> NextToken:
    """After a prompt without "é", the bytes of the text, then the end."""
    script = [*text.encode(), EOS]
    return lambda ids, sampling: script[len(ids) - 2]


class Client:
    """Collects the events of one request, and fails at the second end."""

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        self.events: list[Event] = []
        self.is_over = threading.Event()
        self._on_event = on_event

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.is_over.set()
        if self._on_event is not None:
            self._on_event(event)

    def end(self) -> Finished | Failed:
        assert self.is_over.wait(WAIT_S), "no end came"
        ends = [event for event in self.events if isinstance(event, Finished | Failed)]
        assert len(ends) == 1
        assert self.events[-1] is ends[0]
        return ends[0]

    def answer(self) -> CompletionOutput:
        end = self.end()
        assert isinstance(end, Finished)
        (answer,) = end.output.outputs
        tokens = [event for event in self.events if isinstance(event, TokenEvent)]
        assert "".join(event.text for event in tokens) == answer.text
        assert [token for event in tokens for token in event.token_ids] == answer.token_ids
        return answer

    def error(self) -> Exception:
        end = self.end()
        assert isinstance(end, Failed)
        return end.error


class Engine:
    """A loop over a fake executor, closed and checked at the end of the test."""

    def __init__(self) -> None:
        self.loops: list[tuple[EngineLoop, bool]] = []

    def __call__(
        self,
        *,
        next_token: NextToken | None = None,
        decode: Callable[[Sequence[int]], str] = decode,
        num_kv_blocks: int = 64,
        max_steps_in_flight: int = 2,
        max_model_len: int = 200,
        fail_at_step: int | None = None,
        hang_at_step: int | None = None,
        step_timeout_s: float = WAIT_S,
        clock: Callable[[], float] | None = None,
        encode: Callable[[str], Sequence[int]] | None = lambda text: list(text.encode()),
        start: bool = True,
    ) -> EngineLoop:
        config = SchedulerConfig(
            num_kv_blocks=num_kv_blocks,
            block_tokens=4,
            max_batch_tokens=8,
            max_micro_batches=2,
            max_requests=32,
            max_model_len=max_model_len,
            max_steps_in_flight=max_steps_in_flight,
        )
        self.executor = FakeExecutor(
            num_kv_blocks=num_kv_blocks,
            block_tokens=4,
            next_token=next_token,
            max_batch_tokens=8,
            fail_at_step=fail_at_step,
            hang_at_step=hang_at_step,
        )
        loop = EngineLoop(
            executor=self.executor,
            scheduler=Scheduler(config),
            decode=decode,
            vocab_size=256,
            eos_token_ids=[EOS],
            step_timeout_s=step_timeout_s,
            encode=encode,
            **({} if clock is None else {"clock": clock}),
        )
        if start:
            loop.start()
        self.loops.append((loop, fail_at_step is None and hang_at_step is None))
        return loop


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    for loop, is_well in engine.loops:
        loop.close()
        assert not loop._thread.is_alive()
        if is_well:
            assert loop.failure is None
            loop.integrity()
            assert loop.stats.num_free_kv_blocks == loop.stats.num_kv_blocks


def ask(loop: EngineLoop, name: str, prompt: str = "Q:", **params: object) -> Client:
    client = Client()
    loop.submit(name, list(prompt.encode()), prompt, SamplingParams(temperature=0, **params), client)  # type: ignore[arg-type]
    return client


def test_end_of_sequence_is_in_the_tokens_but_not_in_the_text(engine: Engine) -> None:
    answer = ask(engine(next_token=says("hé!")), "a", max_tokens=20).answer()
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("hé!", "stop", None)
    assert answer.token_ids == [*"hé!".encode(), EOS]


def test_length_by_max_tokens_shows_even_half_a_character(engine: Engine) -> None:
    client = ask(engine(next_token=says("hé!")), "a", max_tokens=2)
    assert (client.answer().text, client.answer().finish_reason) == ("h\ufffd", "length")


def test_length_by_the_model(engine: Engine) -> None:
    answer = ask(engine(next_token=says("abcdefgh"), max_model_len=5), "a", max_tokens=None).answer()
    assert (answer.text, answer.finish_reason) == ("abc", "length")


def test_end_and_length_at_once_is_stop(engine: Engine) -> None:
    assert ask(engine(next_token=says("ab")), "a", max_tokens=3).answer().finish_reason == "stop"


def test_ignore_eos_goes_on(engine: Engine) -> None:
    loop = engine(next_token=lambda ids, sampling: EOS)
    answer = ask(loop, "a", max_tokens=3, ignore_eos=True).answer()
    assert (answer.token_ids, answer.finish_reason) == ([EOS] * 3, "length")


def test_stop_token_id_is_named(engine: Engine) -> None:
    answer = ask(engine(next_token=says("ab.cd")), "a", stop_token_ids=[ord(".")]).answer()
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("ab", "stop", ord("."))


def test_stop_string_over_several_tokens_never_leaks(engine: Engine) -> None:
    client = ask(engine(next_token=says("go ST on STOP it")), "a", max_tokens=50, stop=["STOP"])
    answer = client.answer()
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("go ST on ", "stop", "STOP")


def test_text_held_for_a_stop_string_comes_out_at_the_end(engine: Engine) -> None:
    assert ask(engine(next_token=says("go STO")), "a", stop=["STOP"]).answer().text == "go STO"


def test_logprobs_are_by_token_with_the_chosen_one_first(engine: Engine) -> None:
    client = ask(engine(next_token=says("hi")), "a", logprobs=2)
    logprobs = client.answer().logprobs
    assert logprobs is not None
    assert [list(position) for position in logprobs] == [[104, 105], [105, 106], [255, 0]]
    assert logprobs[0][104].decoded_token == "h"
    assert [event.logprobs for event in client.events if isinstance(event, TokenEvent)][1] == (logprobs[1],)


def test_no_logprobs_unless_asked(engine: Engine) -> None:
    assert ask(engine(), "a", max_tokens=2).answer().logprobs is None


def test_kv_for_three_and_twelve_requests(engine: Engine) -> None:
    """Preempted or not, in whatever batch: each answer is that of its solo run."""
    prompts = {f"r{index}": f"prompt {index:2}" for index in range(12)}
    loop = engine(num_kv_blocks=12)
    clients = {name: ask(loop, name, prompt, max_tokens=12) for name, prompt in prompts.items()}
    together = {name: client.answer().token_ids for name, client in clients.items()}
    assert loop.stats.num_preemptions > 0
    assert engine.executor.max_in_flight == 2
    for name, prompt in prompts.items():
        assert ask(engine(), name, prompt, max_tokens=12).answer().token_ids == together[name]


def test_abort_ends_with_what_there_is(engine: Engine) -> None:
    """From inside the third token's event; the held-back text comes out, and its neighbour does not notice."""
    loop = engine(next_token=says("abST" + "x" * 100))

    def abort_late(event: Event) -> None:
        if isinstance(event, TokenEvent) and len(client.events) == 4:
            assert loop.abort("a")

    client = Client(abort_late)
    loop.submit("a", list(b"Q:"), None, SamplingParams(max_tokens=90, stop="STOP"), client)
    neighbour = ask(loop, "b", max_tokens=20)
    assert neighbour.answer().text == "abST" + "x" * 16
    answer = client.answer()
    assert answer.finish_reason == "abort"
    assert answer.text.startswith("abST")
    assert len(answer.token_ids) < 90


def test_abort_of_nobody_and_of_the_ended_is_no_error(engine: Engine) -> None:
    loop = engine()
    assert loop.abort("nobody") is False
    ask(loop, "a").end()
    assert loop.abort("a") is False


def test_id_is_free_again_after_the_end(engine: Engine) -> None:
    """Even from within the end's own event, while the ranks still know the first one."""
    loop = engine()
    second = Client()

    def again(event: Event) -> None:
        if isinstance(event, Finished):
            loop.submit("a", list(b"Q:"), None, SamplingParams(), second)

    loop.submit("a", list(b"Q:"), None, SamplingParams(), Client(again))
    second.answer()


def test_id_is_free_again_even_while_the_aborted_step_is_in_flight(engine: Engine) -> None:
    """The ranks still compute for the first "b" when the second one comes: to them these are two requests."""
    loop = engine(start=False, max_steps_in_flight=3)
    second = Client()

    def abort_b(event: Event) -> None:
        if len(a.events) == 1:
            loop.abort("b")

    def again(event: Event) -> None:
        if isinstance(event, Finished):
            loop.submit("b", list(b"Q:"), None, SamplingParams(max_tokens=3), second)

    a, b = Client(abort_b), Client(again)
    loop.submit("a", list(b"Q:"), None, SamplingParams(max_tokens=9), a)
    between = ask(loop, "between", max_tokens=9)
    loop.submit("b", list(b"Q:"), None, SamplingParams(max_tokens=9), b)
    loop.start()
    assert b.answer().finish_reason == "abort"
    assert second.answer().finish_reason == "length"
    assert between.answer().finish_reason == "length"
    assert a.answer().finish_reason == "length"


def test_two_aborts_are_one_end(engine: Engine) -> None:
    loop = engine(start=False)
    client = ask(loop, "a")
    assert loop.abort("a")
    assert loop.abort("a")
    loop.start()
    client.end()
    loop.close()
    assert client.answer().finish_reason == "abort"


def test_id_in_use_and_prompts_that_cannot_run_are_refused_before_anything_happens(engine: Engine) -> None:
    loop = engine(num_kv_blocks=10, hang_at_step=0)
    client = ask(loop, "a")
    other = Client()
    for name, prompt, params, message in [
        ("a", [1], SamplingParams(), "in use"),
        ("b", [], SamplingParams(), "no tokens"),
        ("b", [256], SamplingParams(), r"\[0, 256\), not 256"),
        ("b", [-1], SamplingParams(), "not -1"),
        ("b", [1] * 300, SamplingParams(), "max_model_len is 200"),
        ("b", [1] * 30, SamplingParams(max_tokens=60), "need 23 KV blocks of 4 tokens, but there are 10"),
        ("b", [1], SamplingParams(stop_token_ids=[256]), "stop_token_ids"),
        ("b", [1], SamplingParams(logit_bias={256: 1.0}), "logit_bias token ids"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loop.submit(name, prompt, None, params, other)
    loop.close(timeout_s=0.01)
    assert other.events == []
    assert client.answer().finish_reason == "abort"


def test_callback_that_raises_fails_its_request_alone(engine: Engine) -> None:
    def raise_at_third(event: Event) -> None:
        if isinstance(event, TokenEvent) and len(client.events) == 3:
            raise OSError("the client is gone")

    loop = engine()
    client = Client(raise_at_third)
    neighbours = [ask(loop, "n0", max_tokens=9)]
    loop.submit("a", list(b"Q:"), None, SamplingParams(), client)
    neighbours.append(ask(loop, "n1", max_tokens=9))
    assert isinstance(client.error(), OSError)
    solo = ask(engine(), "n", max_tokens=9).answer()
    assert [neighbour.answer().text for neighbour in neighbours] == [solo.text] * 2
    assert loop.stats.num_failed == 1


def test_callback_that_raises_at_its_end_is_logged(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def raise_at_end(event: Event) -> None:
        if isinstance(event, Finished):
            raise OSError("the client is gone")

    loop = engine()
    client = Client(raise_at_end)
    loop.submit("a", list(b"Q:"), None, SamplingParams(), client)
    client.answer()
    ask(loop, "b").answer()
    assert "'a'" in caplog.text


def test_text_that_cannot_be_decoded_fails_its_request_alone(engine: Engine) -> None:
    def fussy(ids: Sequence[int]) -> str:
        if ord("#") in ids:
            raise ValueError("no such token")
        return decode(ids)

    loop = engine(
        decode=fussy, next_token=lambda ids, sampling: ord("#") if ids[0] == ord("!") and len(ids) == 5 else 97
    )
    bad, good = ask(loop, "bad", "!:"), ask(loop, "good")
    assert isinstance(bad.error(), ValueError)
    assert good.answer().text == "a" * 16


@pytest.mark.parametrize("fail_at_step", [0, 1, 5])
def test_lost_rank_fails_every_request_once_and_the_engine_takes_no_more(engine: Engine, fail_at_step: int) -> None:
    loop = engine(fail_at_step=fail_at_step, num_kv_blocks=12)
    clients = []
    refused = 0
    for index in range(20):
        try:
            clients.append(ask(loop, f"r{index}", max_tokens=12))
        except ClusterError:
            refused += 1
    for client in clients:
        error = client.error()
        assert isinstance(error, ClusterError)
        assert "rank 0 failed at step" in str(error)
    assert len({id(client.error()) for client in clients}) + refused == 20
    with pytest.raises(ClusterError, match="takes no requests: rank 0 failed"):
        ask(loop, "late")
    assert isinstance(loop.failure, ClusterError)


def test_step_that_never_answers_ends_at_its_deadline(engine: Engine) -> None:
    loop = engine(hang_at_step=1, step_timeout_s=0.05)
    assert "no result within 0.05 s" in str(ask(loop, "a").error())


def test_bug_in_the_executor_is_an_explicit_error_too(engine: Engine) -> None:
    def broken(ids: Sequence[int], sampling: SamplingSpec) -> int:
        raise KeyError("a bug")

    loop = engine(next_token=broken)
    engine.loops[-1] = (loop, False)
    error = ask(loop, "a").error()
    assert isinstance(error, ClusterError)
    assert "KeyError: 'a bug'" in str(error)


def test_close_aborts_what_lives_even_in_a_step_that_never_answers(engine: Engine) -> None:
    loop = engine(hang_at_step=3)
    clients = [ask(loop, f"r{index}", max_tokens=50) for index in range(5)]
    loop.close(timeout_s=0.05)
    assert [client.answer().finish_reason for client in clients] == ["abort"] * 5
    loop.close()
    with pytest.raises(ClusterError, match="closed"):
        ask(loop, "late")


def test_close_lets_the_steps_in_flight_come_back(engine: Engine) -> None:
    """So that no block is lost: the fixture checks the integrity of the closed engine."""
    loop = engine(next_token=lambda ids, sampling: 97)
    started: queue.SimpleQueue[Event] = queue.SimpleQueue()
    client = Client(started.put)
    loop.submit("a", list(b"Q:"), None, SamplingParams(max_tokens=190), client)
    started.get(timeout=WAIT_S)
    loop.close()
    assert client.end().reason in ("abort", "length")  # type: ignore[union-attr]


def test_a_step_is_told_of_once_the_next_one_is_under_way(engine: Engine) -> None:
    """What listens takes time: ranks compute meanwhile. At the end there is no next one to wait for."""
    loop = engine(next_token=lambda ids, sampling: 97)
    num_sent: list[int] = []
    client = Client(lambda event: num_sent.append(len(engine.executor.plans)))
    loop.submit("a", list(b"Q:"), None, SamplingParams(max_tokens=3), client)
    assert client.answer().text == "aaa"
    assert num_sent == [2, 3, 3, 3]


def test_close_before_start_ends_what_was_queued(engine: Engine) -> None:
    loop = engine(start=False)
    client = ask(loop, "a", max_tokens=4)
    loop.close()
    assert client.answer().finish_reason == "abort"


def test_close_from_a_callback_is_refused_not_a_deadlock(engine: Engine) -> None:
    loop = engine()
    client = Client(lambda event: loop.close())
    loop.submit("a", list(b"Q:"), None, SamplingParams(), client)
    assert "on_event" in str(client.error())


def test_seed_is_drawn_here_and_never_by_the_ranks(engine: Engine) -> None:
    loop = engine()
    for name, seed in [("a", None), ("b", None), ("c", 5), ("d", 5)]:
        client = Client()
        loop.submit(name, list(b"Q:"), None, SamplingParams(seed=seed, max_tokens=2), client)
        client.end()
    seeds = [new.sampling.seed for plan in engine.executor.plans for new in plan.new]
    assert seeds[2:] == [5, 5]
    assert seeds[0] != seeds[1]


def test_metrics_come_from_the_clock(engine: Engine) -> None:
    now = iter(range(1000))
    end = ask(engine(clock=lambda: float(next(now))), "a", max_tokens=3).end()
    assert isinstance(end, Finished)
    metrics = end.output.metrics
    assert metrics.first_scheduled_s is not None
    assert metrics.first_token_s is not None
    assert metrics.finished_s is not None
    assert metrics.arrival_s < metrics.first_scheduled_s < metrics.first_token_s < metrics.finished_s
    assert metrics.num_generated_tokens == 3
    assert metrics.tpot_s == (metrics.finished_s - metrics.first_token_s) / 2
    assert (metrics.ttft_s, metrics.latency_s) == (
        metrics.first_token_s - metrics.arrival_s,
        metrics.finished_s - metrics.arrival_s,
    )


def test_many_threads_submit_and_abort(engine: Engine) -> None:
    """Every request of every thread ends once; the fixture checks that no block is lost."""
    loop = engine(num_kv_blocks=12)
    clients: list[Client] = []

    def work(thread: int) -> None:
        for index in range(15):
            clients.append(ask(loop, f"{thread}-{index}", f"secret {thread}-{index}", max_tokens=10))
            if index % 3 == 0:
                loop.abort(f"{thread}-{index}")

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(clients) == 60
    for client in clients:
        assert client.answer().finish_reason in ("length", "stop", "abort")


def test_engine_needs_no_torch_ray_or_transformers() -> None:
    """The engine is tested and started in milliseconds because it stays free of these."""
    code = (
        "import sys, dist_infer.engine.loop, dist_infer.engine.fake_executor\n"
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# ---- several answers, and what is told of the prompt


def family(loop: EngineLoop, name: str, prompt: str = "Q: what?", **params: object) -> Client:
    client = Client()
    loop.submit(name, list(prompt.encode()), prompt, SamplingParams(**params), client)  # type: ignore[arg-type]
    return client


def outputs(client: Client) -> list[CompletionOutput]:
    """Checked against the events: each answer's are its own, in order."""
    end = client.end()
    assert isinstance(end, Finished)
    answers = end.output.outputs
    assert [answer.index for answer in answers] == list(range(len(answers)))
    for answer in answers:
        events = [event for event in client.events if isinstance(event, TokenEvent) and event.index == answer.index]
        assert "".join(event.text for event in events) == answer.text
        assert [token for event in events for token in event.token_ids] == answer.token_ids
    return answers


@pytest.mark.parametrize("num_kv_blocks", [64, 9])
def test_n_answers_are_n_requests_with_their_own_seeds(engine: Engine, num_kv_blocks: int) -> None:
    """Whatever is shared or preempted: answer i is that of a request with seed i, and there is one end."""
    loop = engine(num_kv_blocks=num_kv_blocks)
    params = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    answers = outputs(family(loop, "a", n=5, seed=11, **params))
    assert (loop.stats.num_preemptions > 0) == (num_kv_blocks == 9)
    assert len({tuple(answer.token_ids) for answer in answers}) == 5
    for index, answer in enumerate(answers):
        (alone,) = outputs(family(engine(), "b", seed=sample_seed(11, index), **params))
        assert (alone.token_ids, alone.text) == (answer.token_ids, answer.text)
    assert (loop.stats.num_finished, loop.stats.num_prompt_tokens) == (1, 8)


def test_a_prompt_is_computed_once_for_n_answers(engine: Engine) -> None:
    loop = engine(max_steps_in_flight=1)
    outputs(family(loop, "a", n=4, max_tokens=3, ignore_eos=True))
    assert sum(plan.num_tokens for plan in engine.executor.plans) == 8 + 3 + 4 * 2


def test_answers_end_each_on_its_own_and_the_request_with_the_last(engine: Engine) -> None:
    """The second answer stops at once, the others go on to their length."""

    def next_token(ids: Sequence[int], sampling: SamplingSpec) -> int:
        return EOS if sampling.seed == sample_seed(3, 1) else ord("x")

    answers = outputs(family(engine(next_token=next_token), "a", n=3, seed=3, temperature=1.0, max_tokens=6))
    assert [(answer.text, answer.finish_reason) for answer in answers] == [
        ("xxxxxx", "length"),
        ("", "stop"),
        ("xxxxxx", "length"),
    ]


class Ranking:
    """Tokens by seed, and log-probabilities that make answer 2 the best for each token, answer 0 the next."""

    def __init__(self) -> None:
        self.of_seed = {sample_seed(5, index): index for index in range(3)}

    def __call__(self, ids: Sequence[int], sampling: SamplingSpec) -> int:
        return ord("abc"[self.of_seed[sampling.seed]])


def test_best_of_gives_the_likeliest_for_each_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is given before it is known; the longest is not the worst for being long."""
    ranking, sample = Ranking(), FakeExecutor._sample

    def ranked(self: FakeExecutor, request_id: str) -> SampledToken:
        token = sample(self, request_id)
        is_last = token.token_id == ord("b") and len(self._known[request_id].token_ids) == 9
        token_id = EOS if is_last else token.token_id
        return SampledToken(request_id, token_id, {"a": -2.0, "b": -3.0, "c": -1.0}[chr(token.token_id)])

    monkeypatch.setattr(FakeExecutor, "_sample", ranked)
    client = family(engine(next_token=ranking), "a", n=2, best_of=3, seed=5, temperature=1.0, max_tokens=4)
    answers = outputs(client)
    assert [answer.text for answer in answers] == ["cccc", "aaaa"]
    assert [answer.cumulative_logprob for answer in answers] == [-4.0, -8.0]
    assert [answer.logprobs for answer in answers] == [None, None]
    assert len(client.events) == 3


def test_an_abort_ends_all_answers_once(engine: Engine) -> None:
    loop = engine(next_token=lambda ids, sampling: ord("x"))

    def abort_late(event: Event) -> None:
        if isinstance(event, TokenEvent) and len(client.events) == 7:
            loop.abort("a")

    client = Client(abort_late)
    loop.submit("a", [1, 2, 3], None, SamplingParams(n=3, max_tokens=150), client)
    answers = outputs(client)
    assert {answer.finish_reason for answer in answers} == {"abort"}
    assert sum(len(answer.token_ids) for answer in answers) >= 7
    assert loop.stats.num_aborted == 1


def test_an_answer_that_fails_fails_its_request_alone(engine: Engine) -> None:
    loop = engine()

    def broken(event: Event) -> None:
        if isinstance(event, TokenEvent) and event.index == 2:
            raise ValueError("no third answer, please")

    client, other = Client(broken), Client()
    with loop.together():
        loop.submit("a", [1, 2, 3, 4, 5], None, SamplingParams(n=3, max_tokens=50, ignore_eos=True), client)
        loop.submit("b", [1, 2, 3], None, SamplingParams(n=2, max_tokens=20, ignore_eos=True), other)
    assert "no third answer" in str(client.error())
    assert [len(answer.token_ids) for answer in outputs(other)] == [20, 20]


def test_stops_wait_for_min_tokens(engine: Engine) -> None:
    """Neither string nor id ends it before; what completes before does not count."""
    loop = engine(next_token=says("ab.ab.ab."))
    answer = ask(loop, "a", min_tokens=4, stop=["b."]).answer()
    assert (answer.text, answer.stop_reason) == ("ab.a", "b.")
    answer = ask(loop, "b", min_tokens=3, stop_token_ids=[ord(".")]).answer()
    assert (answer.text, answer.stop_reason) == ("ab.ab", ord("."))
    assert engine.executor.plans[0].new[0].sampling.held_back == (EOS,)


@pytest.mark.parametrize("min_tokens", [1, 2, 3])
def test_a_stop_string_that_begins_within_min_tokens_ends_the_answer(engine: Engine, min_tokens: int) -> None:
    """It was looked for in later text alone: the answer went on behind it and showed it."""
    client = ask(engine(next_token=says("a STOP it")), "a", min_tokens=min_tokens, stop=["STOP"])
    answer = client.answer()
    assert (answer.text, answer.stop_reason) == ("a ", "STOP")


def test_text_held_back_within_min_tokens_comes_out_at_the_end(engine: Engine) -> None:
    loop = engine(next_token=says("go STO"))
    assert ask(loop, "a", min_tokens=6, max_tokens=6, stop=["STOP"]).answer().text == "go STO"


def test_an_answer_without_an_end_has_no_output() -> None:
    """It said "abort": whoever forgot to end an answer would have told its client so."""
    params = SamplingParams()
    request = Request(id="a", prompt_token_ids=(1,), params=params, sampling=params.spec(0))
    answer = Answer(request, decode, None)
    with pytest.raises(RuntimeError, match="has not ended"):
        answer.output(0)
    answer.abort()
    assert answer.output(0).finish_reason == "abort"


def test_without_a_tokenizer_texts_to_look_for_are_refused(engine: Engine) -> None:
    """A stop string would never be found in a text that is always empty: an option that does nothing."""
    loop = engine(encode=None)
    for params, message in [
        (SamplingParams(stop="x"), "stop strings need a tokenizer.*use stop_token_ids"),
        (SamplingParams(bad_words="x"), "bad_words need a tokenizer.*use logit_bias"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loop.check([1], params)


def test_bad_words_are_encoded_once(engine: Engine) -> None:
    """A list of 256 words was encoded at every check and every submission, the latter with the engine held."""
    encoded: list[str] = []

    def encode(text: str) -> Sequence[int]:
        encoded.append(text)
        return list(text.encode())

    loop = engine(encode=encode)
    for name in ("a", "b"):
        loop.check([1], SamplingParams(bad_words=["no", "on"]))
        ask(loop, name, max_tokens=1, bad_words=["no", "on"]).answer()
    assert encoded == ["no", " no", "on", " on"]
    assert [new.sampling.bad_words for plan in engine.executor.plans for new in plan.new] == [
        ((110, 111), (32, 110, 111), (111, 110), (32, 111, 110))
    ] * 2
    for index in range(200):
        loop.check([1], SamplingParams(bad_words=[f"word {index}"]))
    assert loop._bad_word_ids.cache_info().currsize < 100


def test_logits_that_are_no_numbers_fail_their_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the client's doing, so no ConfigError, and no failure of the engine either."""
    sample = FakeExecutor._sample

    def damaged(self: FakeExecutor, request_id: str) -> SampledToken:
        known = self._known[request_id]
        if known.token_ids[0] == ord("!") and len(known.token_ids) == 4:
            return SampledToken(request_id, 0, error="not finite", is_fault=True)
        return sample(self, request_id)

    monkeypatch.setattr(FakeExecutor, "_sample", damaged)
    loop = engine(next_token=lambda ids, sampling: 97)
    bad, good = ask(loop, "bad", "!:"), ask(loop, "good")
    assert type(bad.error()) is DistInferError
    assert "not finite" in str(bad.error())
    assert good.answer().text == "a" * 16


def test_a_prompt_whose_logits_are_no_numbers_fails_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = FakeExecutor._score_prompt

    def damaged(self: FakeExecutor, chunk: Chunk) -> list[PromptLogprobs]:
        return [replace(found, logprobs=(math.nan,) * len(found.logprobs)) for found in score(self, chunk)]

    monkeypatch.setattr(FakeExecutor, "_score_prompt", damaged)
    loop = engine(next_token=lambda ids, sampling: 97)
    bad, good = ask(loop, "bad", prompt_logprobs=0), ask(loop, "good")
    assert "a part of the prompt are not finite numbers" in str(bad.error())
    assert good.answer().text == "a" * 16


# ---- priority


def test_the_more_urgent_goes_first_and_equals_in_their_order(engine: Engine) -> None:
    loop = engine(num_kv_blocks=3, max_steps_in_flight=1, start=False)  # room for one at a time
    order: list[str] = []

    def noting(name: str) -> Client:
        return Client(lambda event: order.append(name) if isinstance(event, Finished) else None)

    clients = []
    for name, priority in [("a", 0), ("b", 5), ("c", -5), ("d", 0), ("e", -5)]:
        client = noting(name)
        loop.submit(name, [1] * 6, None, SamplingParams(max_tokens=2, ignore_eos=True), client, priority)
        clients.append(client)
    loop.start()
    for client in clients:
        client.end()
    assert order == ["c", "e", "a", "d", "b"]


@pytest.mark.parametrize("priority", [True, 1.0, "1", None])
def test_a_priority_that_is_no_whole_number_is_refused(engine: Engine, priority: object) -> None:
    with pytest.raises(ConfigError, match="priority must be a whole number"):
        engine().submit("a", [1], None, SamplingParams(), Client(), priority)  # type: ignore[arg-type]


def test_bad_words_reach_the_ranks_as_token_ids(engine: Engine) -> None:
    loop = engine()
    ask(loop, "a", max_tokens=1, bad_words=["no"]).answer()
    assert engine.executor.plans[0].new[0].sampling.bad_words == ((110, 111), (32, 110, 111))
    wide = engine(encode=lambda text: [300])
    with pytest.raises(ConfigError, match="token ids of bad_words"):
        ask(wide, "a", bad_words=["no"])


@pytest.mark.parametrize("num_kv_blocks", [64, 9])
def test_prompt_logprobs_are_of_every_token_but_the_first(engine: Engine, num_kv_blocks: int) -> None:
    """Over several chunks and steps, beside others, and when the prompt is computed again after a preemption."""
    loop = engine(num_kv_blocks=num_kv_blocks)
    text = "a prompt of 20 chars"
    with loop.together():
        others = [ask(loop, f"other{index}", "Q: w?", max_tokens=12, ignore_eos=True) for index in range(2)]
        client = family(loop, "a", text, n=2, prompt_logprobs=1, max_tokens=10, ignore_eos=True)
    end = client.end()
    assert isinstance(end, Finished)
    found = end.output.prompt_logprobs
    assert found is not None
    assert found[0] is None
    for at, (byte, entry) in enumerate(zip(text.encode(), found, strict=True)):
        if entry is not None:
            assert next(iter(entry)) == byte
            assert (entry[byte].decoded_token, entry[byte].logprob) == (chr(byte), -at)
    assert sum(entry is None for entry in found) == 1
    assert all(isinstance(other.end(), Finished) for other in others)
    assert (loop.stats.num_preemptions > 0) == (num_kv_blocks == 9)


def test_no_prompt_logprobs_unless_asked(engine: Engine) -> None:
    end = ask(engine(), "a", max_tokens=2).end()
    assert isinstance(end, Finished)
    assert end.output.prompt_logprobs is None
