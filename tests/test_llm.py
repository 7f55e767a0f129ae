"""The Python API on a tiny model: what goes in, what comes out, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_infer import LLM, Finished, SamplingParams, TokenEvent, load_config
from dist_infer.errors import ClusterError, ConfigError, DistInferError, StoreError, WorkerError

PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 9]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=230, temperature=0, ignore_eos=True)
MAX_MODEL_LEN = 240


def run_config(path: Path, store: Path, *, tensor: int = 1, pipeline: int = 1, **engine: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(path)},
        "parallel": {"tensor": tensor, "pipeline": pipeline},
        "offload": {"store": str(store)},
        "engine": {
            "kv_memory": "1 MiB",
            "block_tokens": 4,
            "max_batch_tokens": 16,
            "max_requests": 4,
            "max_model_len": MAX_MODEL_LEN,
            **engine,
        },
        "cluster": {"device": "cpu"},
    }


def without_restarts(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "cluster": {**config["cluster"], "max_restarts": 0}}


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def llm(path: Path, store_root: Path) -> Iterator[LLM]:
    with LLM(run_config(path, store_root)) as made:
        yield made


@pytest.fixture(scope="module")
def worded(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a tokenizer: word `w7` is token 7; no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("worded") / "model"
    shutil.copytree(path, directory)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w2").save_pretrained(directory)
    return directory


def tokens(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def wait_until(what: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        pause.wait(0.01)


def assert_idle(llm: LLM) -> None:
    wait_until(lambda: llm.stats.num_running == llm.stats.num_waiting == 0)
    assert llm.stats.num_free_kv_blocks == llm.stats.num_kv_blocks
    llm.integrity()


@contextlib.contextmanager
def leaves_nothing() -> Iterator[Callable[[], list[psutil.Process]]]:
    """No thread, no child process, no open file more than before; gives a look at the children since, oldest first."""
    me = psutil.Process()
    threads, children, files = set(threading.enumerate()), set(me.children(recursive=True)), me.num_fds()
    yield lambda: sorted(set(me.children()) - children, key=lambda child: child.create_time())
    wait_until(lambda: set(threading.enumerate()) <= threads)
    wait_until(lambda: set(me.children(recursive=True)) <= children)
    gc.collect()  # a test's own errors hold frames
    wait_until(lambda: me.num_fds() <= files)


# ---- what goes in and comes out


def test_prompts_may_be_one_list_or_many(llm: LLM) -> None:
    many = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt_token_ids for output in many] == PROMPTS
    assert all(output.prompt is None and output.finished for output in many)
    assert tokens(llm, PROMPTS[0]) == tokens(llm, [PROMPTS[0]]) == tokens(llm, (tuple(PROMPTS[0]),))
    assert tokens(llm, PROMPTS[0])[0] == many[0].outputs[0].token_ids
    assert llm.generate([], GREEDY) == []


def test_a_rank_apart_computes_in_a_process_of_its_own(llm: LLM, path: Path, store_root: Path) -> None:
    """An endpoint's connections are not held up by a pass, nor a pass by them."""
    assert {report.pid for report in llm.worker_reports} == {os.getpid()}
    with LLM(run_config(path, store_root, pipeline=2), apart=True) as apart:
        (pid,) = {report.pid for report in apart.worker_reports}
        assert pid != os.getpid()
        assert not apart.gang.computes_here
        assert tokens(apart, PROMPTS) == tokens(llm, PROMPTS)
    assert not psutil.pid_exists(pid)


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    lengths = [1, 4, 7]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
    outputs = llm.generate(PROMPTS, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    whole = tokens(llm, PROMPTS, SamplingParams(max_tokens=7, temperature=0, ignore_eos=True))
    for output, expected in zip(outputs, whole, strict=True):
        assert output.outputs[0].token_ids == expected[: len(output.outputs[0].token_ids)]
    with pytest.raises(ConfigError, match="3 prompts, but 2 sampling_params"):
        llm.generate(PROMPTS, params[:2])


@pytest.mark.parametrize(
    "prompts",
    [
        [160],
        [-1],
        [True],
        [1.5],
        [[5, 6], [7, 160]],
        [[]],
        [5, None],
        [5, "a"],
        [None],
        [{}],
        5,
        None,
        [[5, "a"]],
        b"ab",
    ],
    ids=str,
)
def test_a_bad_prompt_is_refused_and_costs_nothing(llm: LLM, prompts: Any) -> None:
    """Also when only the second of two is bad: the first must not go on without anybody who waits for it."""
    with pytest.raises(ConfigError):
        llm.generate(prompts, GREEDY)
    assert_idle(llm)
    assert llm.stats.num_failed == 0


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(llm: LLM) -> None:
    with pytest.raises(ConfigError, match=rf"240 tokens.*max_model_len is {MAX_MODEL_LEN}"):
        llm.generate([5] * MAX_MODEL_LEN, GREEDY)
    (answer,) = tokens(llm, [5] * (MAX_MODEL_LEN - 1))
    assert len(answer) == 1  # the model length ends it


def test_stop_tokens_end_an_answer_and_belong_to_it(llm: LLM) -> None:
    (whole,) = tokens(llm, PROMPTS[0], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    stop = whole[3]
    end = whole.index(stop) + 1
    output = llm.generate(
        PROMPTS[0], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    )
    answer = output[0].outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (whole[:end], "stop", stop)


def test_the_end_of_sequence_token_ends_an_answer(path: Path, tmp_path: Path, store_root: Path) -> None:
    """Its id comes from generation_config.json too, where chat models often name another one than in config.json."""
    with LLM(run_config(path, store_root)) as llm:
        (whole,) = tokens(llm, PROMPTS[0])
    changed = tmp_path / "model"
    shutil.copytree(path, changed)
    (changed / "generation_config.json").write_text(f'{{"eos_token_id": [2, {whole[2]}]}}')
    with LLM(run_config(changed, store_root)) as llm:
        answer = llm.generate(PROMPTS[0], SamplingParams(max_tokens=6, temperature=0))[0].outputs[0]
        assert (answer.token_ids, answer.finish_reason) == (whole[: whole.index(whole[2]) + 1], "stop")
        assert tokens(llm, PROMPTS[0]) == [whole]


def test_logprobs_come_for_every_token(llm: LLM) -> None:
    output = llm.generate(PROMPTS[1], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, logprobs=2))[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    for token, found in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(found)) == token
        assert found[token].logprob == max(entry.logprob for entry in found.values())
    metrics = output.metrics
    assert metrics.num_generated_tokens == 3
    assert metrics.ttft_s is not None
    assert metrics.latency_s is not None
    assert 0 < metrics.ttft_s <= metrics.latency_s


# ---- text


def test_text_without_a_tokenizer_is_refused_and_says_what_works(llm: LLM) -> None:
    for call in (
        lambda: llm.generate("Hello"),
        lambda: llm.generate(["Hello"]),
        lambda: llm.chat([{"role": "user", "content": "Hello"}]),
        lambda: llm.encode("Hello"),
    ):
        with pytest.raises(ConfigError, match="token ids"):
            call()
    assert_idle(llm)


def test_text_and_chat_with_a_tokenizer(worded: Path, store_root: Path, tmp_path: Path) -> None:
    with LLM(run_config(worded, store_root)) as llm:
        by_text, by_ids = llm.generate(["w5 w6 w7 w8", PROMPTS[0]], GREEDY)
        assert by_text.prompt_token_ids == PROMPTS[0]
        assert (by_text.prompt, by_ids.prompt) == ("w5 w6 w7 w8", None)
        assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
        assert by_text.outputs[0].text == by_ids.outputs[0].text
        assert by_text.outputs[0].text.split() == [f"w{i}" for i in by_text.outputs[0].token_ids]
        with pytest.raises(ConfigError, match="no chat template"):
            llm.chat([{"role": "user", "content": "w5"}])
        with pytest.raises(ConfigError, match="refuses this text"):
            llm.generate("half a pair: \ud800")
        assert_idle(llm)
    chatty = tmp_path / "model"
    shutil.copytree(worded, chatty)
    (chatty / "chat_template.jinja").write_text(
        "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
    )
    with LLM(run_config(chatty, store_root)) as llm:
        one, two = (
            [{"role": "user", "content": "w9"}],
            [{"role": "system", "content": "w8"}, {"role": "user", "content": "w7"}],
        )
        assert llm.chat(one, GREEDY)[0].prompt_token_ids == [3, 9, 4]
        assert [output.prompt_token_ids for output in llm.chat([one, two], GREEDY)] == [[3, 9, 4], [3, 8, 3, 7, 4]]


def test_a_chat_template_gets_no_way_out(worded: Path, store_root: Path, tmp_path: Path) -> None:
    """A template is a program out of a downloaded file: an attack ends as an error, and the engine goes on."""
    evil = tmp_path / "model"
    shutil.copytree(worded, evil)
    marker = tmp_path / "marker"
    (evil / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        "{{ lipsum.__globals__['os'].system('touch " + str(marker) + "') }}"
    )
    with LLM(run_config(evil, store_root)) as llm:
        with pytest.raises(ConfigError, match=r"chat template fails.*SecurityError"):
            llm.chat([{"role": "user", "content": "w9"}])
        assert not marker.exists()
        assert_idle(llm)


# ---- streaming


async def test_a_stream_brings_every_token_and_one_end(llm: LLM) -> None:
    expected = tokens(llm, PROMPTS[0])[0]
    events = [event async for event in llm.stream(PROMPTS[0], GREEDY)]
    *parts, last = events
    assert all(isinstance(event, TokenEvent) for event in parts)
    assert [token for event in parts for token in event.token_ids] == expected
    assert isinstance(last, Finished)
    assert last.output.outputs[0].token_ids == expected
    assert_idle(llm)


async def test_streams_run_together(llm: LLM) -> None:
    expected = tokens(llm, PROMPTS)

    async def collect(prompt: list[int]) -> list[int]:
        return [t async for e in llm.stream(prompt, GREEDY) if isinstance(e, TokenEvent) for t in e.token_ids]

    assert await asyncio.gather(*(collect(prompt) for prompt in PROMPTS)) == expected


async def test_leaving_a_stream_early_frees_its_blocks(llm: LLM) -> None:
    before = llm.stats.num_aborted
    async with contextlib.aclosing(llm.stream(PROMPTS[0], LONG)) as stream:
        async for _ in stream:
            break
    wait_until(lambda: llm.stats.num_aborted == before + 1)
    assert_idle(llm)


async def test_a_cancelled_stream_frees_its_blocks(llm: LLM) -> None:
    before = llm.stats.num_aborted
    started = asyncio.Event()

    async def read() -> None:
        async for _ in llm.stream(PROMPTS[0], LONG):
            started.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(started.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wait_until(lambda: llm.stats.num_aborted == before + 1)
    assert_idle(llm)


async def test_a_stream_refuses_a_bad_prompt(llm: LLM) -> None:
    with pytest.raises(ConfigError):
        await anext(llm.stream([160], GREEDY))
    assert_idle(llm)


def test_leaving_events_early_aborts_the_rest(llm: LLM) -> None:
    before = llm.stats.num_aborted
    events = llm.events([(None, list(prompt)) for prompt in PROMPTS], [LONG] * 3)
    next(events)
    events.close()
    wait_until(lambda: llm.stats.num_aborted == before + 3)
    assert_idle(llm)


# ---- determinism


def test_the_same_seed_gives_the_same_tokens_alone_in_a_batch_and_cut(llm: LLM, path: Path, store_root: Path) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=12, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True)

    seeds = [3, -1, 2**63 - 1]
    together = tokens(llm, PROMPTS, [params(seed) for seed in seeds])
    alone = [tokens(llm, prompt, params(seed))[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert alone == together
    assert tokens(llm, PROMPTS[0], params(4))[0] != together[0]
    with LLM(run_config(path, store_root, pipeline=2)) as cut:
        assert tokens(cut, PROMPTS, [params(seed) for seed in seeds]) == together


def test_without_a_seed_runs_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5, ignore_eos=True)
    assert tokens(llm, PROMPTS[0], params) != tokens(llm, PROMPTS[0], params)


def test_too_little_kv_for_all_at_once_changes_no_answer(llm: LLM, path: Path, store_root: Path) -> None:
    """Requests are put back and computed again; what they answer must not show it."""
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    expected = tokens(llm, PROMPTS, params)
    with LLM(run_config(path, store_root, max_model_len=52)) as big:
        block_bytes = big.plan.ranks[0].kv_bytes // big.plan.ranks[0].num_kv_blocks
    with LLM(run_config(path, store_root, kv_memory=16 * block_bytes, max_model_len=52)) as small:
        assert tokens(small, PROMPTS, params) == expected
        assert small.stats.num_preemptions > 0
        assert_idle(small)


# ---- life and death


@pytest.mark.parametrize("pipeline", [1, 2])
def test_nothing_stays_behind(path: Path, store_root: Path, pipeline: int) -> None:
    with leaves_nothing():
        llm = LLM(load_config(run_config(path, store_root, pipeline=pipeline)))
        llm.generate(PROMPTS, GREEDY)
        llm.close()
        llm.close()
    with pytest.raises(ClusterError, match="closed"):
        llm.generate(PROMPTS, GREEDY)


def test_closing_ends_running_requests(path: Path, store_root: Path) -> None:
    with leaves_nothing():
        llm = LLM(run_config(path, store_root))
        events = llm.events([(None, PROMPTS[0])], [LONG])
        next(events)
        llm.close()
        last = [event for _, event in events][-1]
        assert isinstance(last, Finished)
        assert last.reason == "abort"


@pytest.mark.parametrize("change", [{"model": {"path": "/no/such"}}, {"offload": {"host_memory": "1 KiB"}}])
def test_a_start_that_fails_leaves_nothing(path: Path, store_root: Path, change: dict[str, Any]) -> None:
    with leaves_nothing(), pytest.raises(DistInferError):
        LLM({**run_config(path, store_root), **change})


def store_with_damage(path: Path, root: Path, unit: str, **parallel: int) -> Path:
    """A root with the packed store of this config, one bit of a unit flipped."""
    with LLM(run_config(path, root, **parallel)):
        pass
    (blob,) = root.glob(f"*/{unit}.tp{parallel.get('tensor', 1) - 1}.bin")
    flip(blob)
    return root


def flip(blob: Path) -> None:
    with open(blob, "r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize(("pipeline", "unit"), [(1, "layers.3"), (2, "layers.7"), (2, "head"), (1, "embed")])
def test_a_damaged_unit_ends_the_start_by_name(path: Path, tmp_path: Path, pipeline: int, unit: str) -> None:
    root = store_with_damage(path, tmp_path, unit, pipeline=pipeline)
    with leaves_nothing(), pytest.raises(WorkerError, match=rf"unit '{unit}' in .* is damaged") as caught:
        LLM(run_config(path, root, pipeline=pipeline))
    assert isinstance(caught.value.__cause__, StoreError)


def test_a_unit_that_goes_bad_while_serving_never_becomes_an_answer(path: Path, tmp_path: Path) -> None:
    """Streamed, checked at every read: the requests fail with the unit's name, later ones are refused."""
    config = run_config(path, tmp_path)
    config["offload"] |= {"verify": "always", "slots": 2}
    with LLM(config) as llm:
        used = llm.plan.budgets[0].used_bytes
        config["offload"]["host_memory"] = used - 3 * llm.plan.ranks[0].units[1].num_bytes // 2
    with leaves_nothing(), LLM(config) as llm:
        streamed = [unit.name for unit in llm.plan.ranks[0].units if unit.tier == "nvme"]
        assert streamed, "the budget of this test no longer makes it stream"
        assert len(tokens(llm, PROMPTS)) == 3
        (blob,) = tmp_path.glob(f"*/{streamed[-1]}.tp0.bin")
        flip(blob)
        with pytest.raises(ClusterError, match=f"unit '{streamed[-1]}' in .* is damaged"):
            llm.generate(PROMPTS, GREEDY)
        with pytest.raises(ClusterError, match="takes no requests"):
            llm.generate(PROMPTS, GREEDY)


# ---- with processes


@pytest.mark.slow
def test_two_tensor_ranks_give_the_same_and_leave_nothing(llm: LLM, path: Path, store_root: Path) -> None:
    expected = tokens(llm, PROMPTS)
    with leaves_nothing() as children, LLM(run_config(path, store_root, tensor=2, pipeline=2)) as two:
        assert len(children()) == 2
        assert tokens(two, PROMPTS) == expected
        assert len(two.stream_reports()) == 4
        assert_idle(two)


@pytest.mark.slow
def test_a_rank_that_fails_while_loading_ends_the_start(path: Path, tmp_path: Path) -> None:
    root = store_with_damage(path, tmp_path, "layers.5", tensor=2)
    with leaves_nothing():
        with pytest.raises(WorkerError, match=r"tensor rank 1: .*unit 'layers\.5' in .* is damaged") as caught:
            LLM(run_config(path, root, tensor=2))
        assert caught.value.rank == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_an_error_and_no_hang(path: Path, store_root: Path, victim: int) -> None:
    """Without restarts; with them: tests/faults/test_lost_ranks.py."""
    config = without_restarts(run_config(path, store_root, tensor=2))
    with leaves_nothing(), LLM(config) as llm:
        (rank,) = [report for report in llm.worker_reports if report.rank == victim]  # pids need not be in their order
        events = llm.events([(None, prompt) for prompt in PROMPTS], [LONG] * 3)
        next(events)
        started = time.monotonic()
        os.kill(rank.pid, signal.SIGKILL)
        ends = [event for _, event in events if not isinstance(event, TokenEvent)]
        assert time.monotonic() - started < 20  # without it: 30
        assert len(ends) == 3
        for end in ends:
            assert f"tensor rank {victim}" in str(end.error)
            assert "signal 9" in str(end.error)
            assert "cluster.max_restarts: 0" in str(end.error)
        with pytest.raises(ClusterError, match="takes no requests"):
            llm.generate(PROMPTS, GREEDY)


@pytest.mark.slow
def test_a_rank_that_falls_silent_is_an_error_within_the_step_timeout(path: Path, store_root: Path) -> None:
    config = without_restarts(run_config(path, store_root, tensor=2, step_timeout="3 s"))
    with leaves_nothing() as children, LLM(config) as llm:
        child = children()[1]
        events = llm.events([(None, PROMPTS[0])], [LONG])
        next(events)
        started = time.monotonic()
        os.kill(child.pid, signal.SIGSTOP)
        (end,) = [event for _, event in events if not isinstance(event, TokenEvent)]
        assert time.monotonic() - started < 20  # without it: 30
        assert isinstance(end.error, ClusterError)
