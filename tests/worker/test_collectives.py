"""Ranks talking over gloo, each a process of its own: sums, uneven slices, hand-over; and that silence has an end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from dist_infer.worker.collectives import NoGroup, bind_rendezvous, join_rendezvous
from partition.errors import ClusterError

pytestmark = pytest.mark.slow
HOST = "127.0.0.1"
PROLOGUE = f"""
import os, signal, sys, time
import torch
from dist_infer.worker import collectives
from partition.errors import ClusterError
torch.set_num_threads(1)
port, rank, tensor, stages, timeout_s = (int(value) for value in sys.argv[1:])
store = collectives.join_rendezvous("{HOST}", port, tensor * stages, timeout_s)
def join():
    return collectives.connect(
        store=store, own_host="{HOST}", rank=rank, tensor=tensor, stages=stages, device="cpu", timeout_s=timeout_s
    )
"""


@contextmanager
def processes(
    script: str, *, tensor: int, stages: int = 1, timeout_s: int = 20, only: range | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """The script once for every rank (or those of `only`); what is left at the end is killed."""
    store, port = bind_rendezvous(HOST, tensor * stages, timeout_s)
    code = PROLOGUE + textwrap.dedent(script)
    with ExitStack() as stack:
        started = []
        for rank in only if only is not None else range(tensor * stages):
            arguments = [str(value) for value in (port, rank, tensor, stages, timeout_s)]
            process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
            stack.callback(process.stdout.close)
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            started.append(process)
        yield started
    del store  # the ranks needed it until now


def output(process: subprocess.Popen[str], timeout_s: float = 60) -> str:
    text, _ = process.communicate(timeout=timeout_s)
    return text.strip()


def test_sums_and_uneven_slices_of_two_ranks() -> None:
    """Rank 1 holds fewer columns (half of an odd vocabulary); only rank 0 needs the whole."""
    script = """
    group, link = join()
    assert link is None and group.size == 2
    summed = group.all_reduce(torch.arange(6.).reshape(2, 3).t() * (rank + 1))
    widths = (3, 2)
    own = torch.arange(10.).reshape(2, 5)[:, :3] if rank == 0 else torch.arange(10.).reshape(2, 5)[:, 3:]
    whole = group.gather_columns(own, widths)
    print(summed.tolist(), whole.tolist(), group.seconds > 0, flush=True)
    collectives.disconnect()
    """
    with processes(script, tensor=2) as ranks:
        first, second = (output(rank) for rank in ranks)
    summed = (torch.arange(6.0).reshape(2, 3).t() * 3).tolist()
    assert first == f"{summed} {torch.arange(10.0).reshape(2, 5).tolist()} True"
    assert second == f"{summed} {[[3.0, 4.0], [8.0, 9.0]]} True"


def test_hidden_states_go_from_stage_to_stage_within_their_tensor_rank() -> None:
    """Two in flight: the second send must not overwrite what the first is still sending."""
    script = """
    group, link = join()
    assert group.size == 2
    if rank < 2:
        for step in range(2):
            link.send(torch.full((1, 2, 3), 10. * step + rank).bfloat16())
        link.flush()
        print("sent", flush=True)
    else:
        got = [link.receive((1, 2, 3), torch.bfloat16, torch.device("cpu")).unique().tolist() for _ in range(2)]
        print(got, group.all_reduce(torch.ones(1)).item(), flush=True)
    collectives.disconnect()
    """
    # the other stage's group must have taken part in nothing: only ranks 2 and 3 reduce
    with processes(script, tensor=2, stages=2) as ranks:
        assert [output(rank) for rank in ranks] == ["sent", "sent", "[[0.0], [10.0]] 2.0", "[[1.0], [11.0]] 2.0"]


@pytest.mark.parametrize("what", ["group.all_reduce(torch.ones(4))", "group.gather_columns(torch.ones(1, 2), (2, 2))"])
@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGSTOP)", "os._exit(0)"], ids=["stopped", "gone"])
def test_a_silent_peer_is_an_error_within_the_timeout(what: str, how: str) -> None:
    script = f"""
    group, link = join()
    group.all_reduce(torch.ones(1))
    if rank == 1:
        {how}
    started = time.monotonic()
    try:
        {what}
    except RuntimeError:
        print("error", round(time.monotonic() - started), flush=True)
    os._exit(0)
    """
    with processes(script, tensor=2, timeout_s=3) as (first, _):
        word, seconds = output(first).split()
    assert word == "error"
    assert int(seconds) <= 15  # the process group would wait for minutes


def test_a_stage_whose_sender_is_silent_gets_an_error_within_the_timeout() -> None:
    script = """
    group, link = join()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        link.receive((1, 1, 4), torch.float32, torch.device("cpu"))
    except RuntimeError:
        print("error", flush=True)
    os._exit(0)
    """
    started = time.monotonic()
    with processes(script, tensor=1, stages=2, timeout_s=3) as (_, second):
        assert output(second) == "error"
    assert time.monotonic() - started < 40


def test_a_rank_that_never_comes_ends_the_start_by_name() -> None:
    script = """
    started = time.monotonic()
    try:
        join()
    except ClusterError as error:
        print(error, flush=True)
    os._exit(0)
    """
    with processes(script, tensor=2, timeout_s=3, only=range(1)) as (first,):
        assert output(first).startswith("rank 0 could not join the 2 ranks: ")


def test_an_address_of_no_interface_is_refused() -> None:
    script = """
    try:
        collectives.connect(
            store=store, own_host="203.0.113.7", rank=0, tensor=1, stages=1, device="cpu", timeout_s=timeout_s
        )
    except ClusterError as error:
        print(error, flush=True)
    os._exit(0)
    """
    with processes(script, tensor=1, only=range(1)) as (first,):
        assert output(first) == "no network interface of this machine has the address 203.0.113.7"


def test_a_rendezvous_that_nobody_bound_is_a_cluster_error_in_time() -> None:
    with pytest.raises(ClusterError, match=r"no answer from rank 0 at 127\.0\.0\.1, port 1"):
        join_rendezvous(HOST, 1, 2, 1)


def test_alone_there_is_nothing_to_exchange() -> None:
    ones = torch.ones(2)
    assert NoGroup().all_reduce(ones) is ones
    assert NoGroup().gather_columns(ones, (2,)) is ones
