"""FAULTS T01, T03, T04: ranks die, stop and raise under eight requests. Nobody sees an error; the tokens are the same.

On Ray: tests/system/test_ray_recovery.py.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from request_crowd import PARAMS, PROMPTS, Crowd, run_config
from served_model import wait_until

from dist_infer import LLM, gang
from dist_infer.backend import PROCESS_FOOTPRINT_BYTES, LocalBackend
from dist_infer.gang import Gang
from dist_infer.gang_state import Degraded, Failed, Ready
from dist_infer.model.adapter import StageModel
from dist_infer.outputs import Failed as RequestFailed
from dist_infer.outputs import Finished
from partition.errors import ClusterError
from partition.hardware import HardwareFacts
from partition.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
RECOVERED_S = 120.0
RESERVE_BYTES = 64 << 20  # that the planner leaves


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def undisturbed(model: Path, store_root: Path) -> list[list[int]]:
    """One process, nothing lost."""
    with LLM(run_config(model, store_root)) as llm:
        return Crowd(llm).tokens()


@pytest.fixture(scope="module")
def two(model: Path, store_root: Path) -> Iterator[LLM]:
    """Two tensor ranks, a process each."""
    with LLM(run_config(model, store_root, parallel={"tensor": 2})) as llm:
        yield llm


def pids(llm: LLM) -> list[int]:
    return [report.pid for report in llm.worker_reports]


def assert_as_before(llm: LLM, undisturbed: list[list[int]]) -> None:
    """What must hold after every fault: ready, idle, and a golden request."""
    assert isinstance(llm.state, Ready)
    assert Crowd(llm, prompts=PROMPTS[:1]).tokens() == undisturbed[:1]
    wait_until(lambda: llm.stats.num_running == llm.stats.num_waiting == 0)
    assert llm.stats.num_free_kv_blocks == llm.stats.num_kv_blocks
    llm.integrity()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_a_pause(two: LLM, undisturbed: list[list[int]], victim: int) -> None:
    """T01. The cause names the rank that died, not the peer that lost its connection."""
    restarts, before = two.stats.num_gang_restarts, pids(two)
    crowd = Crowd(two)
    assert crowd.has_begun.wait(60)
    os.kill(before[victim], signal.SIGKILL)
    wait_until(lambda: isinstance(two.state, Degraded), 20)
    assert f"tensor rank {victim} (pid {before[victim]}) was killed by signal 9" in two.state.cause
    assert crowd.tokens() == undisturbed
    assert two.stats.num_gang_restarts == restarts + 1
    assert not set(before) & set(pids(two))
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert_as_before(two, undisturbed)


def test_a_rank_that_stops_is_found_by_its_silence(two: LLM, undisturbed: list[list[int]]) -> None:
    """T04: its peer waits in a collective for ten minutes, but says so. The stopped one is killed, not left behind."""
    before = pids(two)
    crowd = Crowd(two)
    assert crowd.has_begun.wait(60)
    os.kill(before[1], signal.SIGSTOP)
    wait_until(lambda: isinstance(two.state, Degraded), 60)
    assert f"tensor rank 1 (pid {before[1]}) has not answered for 5 s and was killed" in two.state.cause
    assert crowd.tokens() == undisturbed
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert_as_before(two, undisturbed)


def test_a_rank_that_is_killed_while_nobody_asks_is_replaced(two: LLM, undisturbed: list[list[int]]) -> None:
    """T01: before the next request comes. Figures can be had all the same, as at the end of a batch."""
    restarts, before, reports = two.stats.num_gang_restarts, pids(two), two.stream_reports()
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: isinstance(two.state, Degraded), 20)
    assert two.stream_reports() == ()
    assert two.summarise([], reports, time.monotonic()).num_passes == 0
    wait_until(lambda: isinstance(two.state, Ready), RECOVERED_S)
    wait_until(lambda: two.stats.num_gang_restarts == restarts + 1)
    assert_as_before(two, undisturbed)


def flip(blob: Path) -> None:
    with open(blob, "r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 4]))


def streamed_config(model: Path, store: Path, **parallel: int) -> dict[str, Any]:
    """Some of the layers are read in each pass, and checked each time."""
    config = run_config(model, store, parallel=parallel, offload={"store": str(store), "verify": "always", "slots": 2})
    with LLM(config) as llm:
        used, layer = llm.plan.budgets[0].used_bytes, llm.plan.ranks[0].units[1].num_bytes
    config["offload"]["host_memory"] = used - 3 * parallel.get("tensor", 1) * layer // 2
    return config


def test_one_rank_that_raises_is_a_pause_and_the_log_says_where(
    model: Path, tmp_path: Path, undisturbed: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """T03: a unit that one of two ranks cannot read, well again when the others come."""
    caplog.set_level(logging.WARNING, "dist_infer.supervisor")
    config = streamed_config(model, tmp_path, tensor=2)
    with LLM(config) as llm:
        streamed = [unit.name for unit in llm.plan.ranks[1].units if unit.tier == "nvme"]
        assert streamed, "the budget of this test no longer makes it stream"
        (blob,) = tmp_path.glob(f"*/{streamed[-1]}.tp1.bin")
        crowd = Crowd(llm)
        assert crowd.has_begun.wait(60)
        flip(blob)
        wait_until(lambda: isinstance(llm.state, Degraded), 60)
        flip(blob)
        assert crowd.tokens() == undisturbed
        assert_as_before(llm, undisturbed)
    said = caplog.messages[0]
    assert "tensor rank 1: StoreError" in said
    assert f"(rank 1, unit '{streamed[-1]}', step " in said
    assert "requests request-" in said


def test_an_exception_in_a_forward_is_a_pause_in_one_process_too(
    model: Path, store_root: Path, undisturbed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T03, and that the ranks before have given their memory back when the next are loaded."""
    layer, num_left = StageModel.layer, [400]
    alive: list[int] = []
    replaced = Gang.replace

    def fails_once(self: StageModel, *arguments: Any) -> Any:
        num_left[0] -= 1
        if num_left[0] == 0:
            raise RuntimeError("planted")
        return layer(self, *arguments)

    def counted(self: Gang, epoch: int) -> str:
        self.executor.close()
        gc.collect()
        alive.append(sum(type(found) is StageModel for found in gc.get_objects()))
        return replaced(self, epoch)

    monkeypatch.setattr(StageModel, "layer", fails_once)
    monkeypatch.setattr(Gang, "replace", counted)
    with LLM(run_config(model, store_root, parallel={"pipeline": 2})) as llm:
        assert Crowd(llm).tokens() == undisturbed
        assert llm.stats.num_gang_restarts == 1
        assert_as_before(llm, undisturbed)
    assert alive == [0]


def test_when_no_restart_is_left_each_request_ends_with_its_own_error(model: Path, tmp_path: Path) -> None:
    """A unit that stays damaged: the first error and the last one, and whoever comes later is told."""
    config = streamed_config(model, tmp_path)
    config["cluster"]["max_restarts"] = 2
    with LLM(config) as llm:
        streamed = [unit.name for unit in llm.plan.ranks[0].units if unit.tier == "nvme"]
        (blob,) = tmp_path.glob(f"*/{streamed[-1]}.tp0.bin")
        crowd = Crowd(llm)
        assert crowd.has_begun.wait(60)
        flip(blob)
        ends = crowd.ends()
        failed = [end for end in ends if isinstance(end, RequestFailed)]
        assert failed
        assert len({id(end.error) for end in failed}) == len(failed)
        for end in failed:
            assert f"unit '{streamed[-1]}' in" in str(end.error)
            assert "2 gangs were started within 600 s and lost" in str(end.error)
        assert isinstance(llm.state, Failed)
        with pytest.raises(ClusterError, match="takes no requests"):
            llm.submit(None, PROMPTS[0], PARAMS, lambda event: None)


def test_closing_does_not_wait_for_others_to_start(model: Path, store_root: Path) -> None:
    """What lives is aborted; ranks that were being started are gone, like those before them."""
    me = psutil.Process()
    before = set(me.children(recursive=True))
    llm = LLM(run_config(model, store_root, parallel={"tensor": 2}))
    with llm:
        crowd = Crowd(llm)
        assert crowd.has_begun.wait(60)
        os.kill(pids(llm)[1], signal.SIGKILL)
        wait_until(lambda: isinstance(llm.state, Degraded) and llm.state.step is not None, 20)
        closing = threading.Thread(target=llm.close)
        closing.start()
        closing.join(20)  # a start takes longer on a machine like this one; the deadline of `close` is 10
        assert not closing.is_alive()
        assert all(isinstance(end, Finished) and end.reason == "abort" for end in crowd.ends())
    wait_until(lambda: set(me.children(recursive=True)) <= before)


class LosesANode(LocalBackend):
    """A cluster of which a node is lost with the first ranks; the one that is left has `memory_bytes`."""

    memory_bytes = 0
    has_lost = False

    def drop_lost_nodes(self, plan: Plan, ended: Mapping[int, Sequence[int]]) -> tuple[str, ...]:
        assert {node: list(pids) for node, pids in ended.items()} == {0: [os.getpid()] * plan.pipeline}
        self.has_lost = True
        return ("node-b (10.0.0.2)",)

    def facts(self, **wanted: Any) -> HardwareFacts:
        found = super().facts(**wanted)
        memory = self.memory_bytes if self.has_lost else found.nodes[0].memory_bytes
        return HardwareFacts(nodes=(replace(found.nodes[0], memory_bytes=memory),))


def lose_a_node_and_a_rank(monkeypatch: pytest.MonkeyPatch, memory_bytes: int) -> None:
    """After some steps."""
    layer, left = StageModel.layer, [400]

    def fails_once(self: StageModel, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("planted")
        return layer(self, *arguments)

    monkeypatch.setattr(StageModel, "layer", fails_once)
    monkeypatch.setattr(LosesANode, "memory_bytes", memory_bytes)
    monkeypatch.setattr(gang, "make_backend", lambda config, name, apart: LosesANode(config))


def test_nodes_that_are_left_take_over_by_a_plan_of_their_own_and_what_that_costs_is_said(
    model: Path, tmp_path: Path, undisturbed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On less memory the same tokens come from a plan that streams. With real hosts: tests/namespaces."""
    config = run_config(model, tmp_path, parallel={"pipeline": 2}, offload={"store": str(tmp_path), "slots": 2})
    with LLM(config) as llm:
        budget, layer_bytes = llm.plan.budgets[0], llm.plan.ranks[0].units[1].num_bytes
        assert not any(rank.bytes_in("nvme") for rank in llm.plan.ranks)
    fits = PROCESS_FOOTPRINT_BYTES + RESERVE_BYTES + budget.used_bytes
    lose_a_node_and_a_rank(monkeypatch, fits - 2 * layer_bytes)
    with LLM(config) as llm:
        assert Crowd(llm).tokens() == undisturbed
        assert any(rank.bytes_in("nvme") for rank in llm.plan.ranks)
        assert isinstance(llm.state, Ready)
        said = re.fullmatch(
            r"without node-b \(10\.0\.0\.2\): .* output tok/s predicted, (.+) streamed per pass, .*; "
            r"before: .* predicted, 0 B streamed per pass, .*",
            llm.state.note,
        )
        assert said, llm.state.note
        assert said[1] != "0 B"
        assert_as_before(llm, undisturbed)


def test_where_no_plan_fits_the_nodes_that_are_left_the_planner_says_why(
    model: Path, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: the same nodes would have no more room at the next attempt."""
    lose_a_node_and_a_rank(monkeypatch, PROCESS_FOOTPRINT_BYTES)
    with LLM(run_config(model, store_root, parallel={"pipeline": 2})) as llm:
        ends = Crowd(llm).ends()
        failed = [str(end.error) for end in ends if isinstance(end, RequestFailed)]
        assert len(failed) == len(ends)
        for words in failed:
            assert "planted" in words
            assert "stay in reserve before any weight is loaded" in words
        assert isinstance(llm.state, Failed)
