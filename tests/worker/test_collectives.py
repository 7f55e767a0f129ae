"""Ranks talking over gloo, each a process of its own: sums, uneven slices, hand-over; and that silence has an end."""

from __future__ import annotations

import re
import time

import pytest
import torch
from rank_processes import HOST, output, processes

from dist_infer.worker.collectives import NoGroup, join_rendezvous
from partition.errors import ClusterError

pytestmark = pytest.mark.slow


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
        link.close()
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
    """By gloo; sums in shared memory: test_shm_reduce.py."""
    script = f"""
    group, link = join(share_memory=False)
    group.all_reduce(torch.ones(1))
    if rank == 1:
        {how}
    started = time.monotonic()
    try:
        {what}
    except ClusterError as error:
        print(round(time.monotonic() - started), error, flush=True)
    os._exit(0)
    """
    with processes(script, tensor=2, timeout_s=3) as (first, _):
        seconds, _, words = output(first).partition(" ")
    assert re.match(r"a (sum|gather) with tensor rank 1 failed: ", words)
    assert int(seconds) <= 15  # the process group would wait for minutes


def test_a_stage_computes_on_while_the_next_one_has_not_asked_for_what_it_sent() -> None:
    """As many hidden states are on their way as steps are in flight; the next stage is still at an earlier step."""
    script = """
    group, link = join(steps_in_flight=2)
    if rank == 0:
        for step in range(2):
            link.send(torch.full((1, 500, 64), float(step)))
        store.set("computed on", "yes")
        link.close()
        link.check()
    else:
        store.wait(["computed on"])
        print([link.receive((1, 500, 64), torch.float32, torch.device("cpu")).unique().item() for _ in range(2)])
    collectives.disconnect()
    """
    with processes(script, tensor=1, stages=2, timeout_s=10) as ranks:
        assert [output(rank) for rank in ranks] == ["", "[0.0, 1.0]"]


def test_a_send_that_fails_is_an_error_of_the_next_step() -> None:
    """Nobody waits for a send, so its error must not be lost."""
    script = """
    group, link = join(steps_in_flight=2)
    if rank == 1:
        os._exit(0)
    link.send(torch.ones(1, 3, 4))
    while link._error is None:
        time.sleep(0.01)
    try:
        link.send(torch.ones(1, 3, 4))
    except ClusterError as error:
        print(error, flush=True)
    os._exit(0)
    """
    with processes(script, tensor=1, stages=2, timeout_s=10) as (first, _):
        assert output(first).startswith("hidden states did not get to rank 1: ")


def test_every_group_has_the_timeout_of_a_step() -> None:
    """torch would give those that are made from others its own, of half an hour."""
    script = """
    group, link = join()
    cpu = torch.device("cpu")
    for made in (link._group, group._group):
        print(made._get_backend(cpu).options._timeout.total_seconds())
    collectives.disconnect()
    """
    with processes(script, tensor=2, stages=2, timeout_s=17) as ranks:
        assert [output(rank).split() for rank in ranks] == [["17.0", "17.0"]] * 4


def test_nccl_ends_a_process_whose_collective_fails_unless_the_operator_wants_it_otherwise() -> None:
    """Its calls return at once: without its watchdog nobody hears of an error. A machine without GPUs gets this far."""
    script = """
    os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = "77"
    try:
        collectives.connect(
            store=store, own_host="127.0.0.1", rank=0, tensor=1, stages=1, device="cuda", timeout_s=timeout_s
        )
    except (ClusterError, ValueError):
        pass
    print({name: value for name, value in os.environ.items() if name.startswith("TORCH_NCCL_")}, flush=True)
    os._exit(0)
    """
    wanted = {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "77", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    with processes(script, tensor=1, only=range(1)) as (first,):
        assert output(first) == str(wanted)


def test_a_stage_whose_sender_is_silent_gets_an_error_within_the_timeout() -> None:
    script = """
    group, link = join()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        link.receive((1, 1, 4), torch.float32, torch.device("cpu"))
    except ClusterError as error:
        print(error, flush=True)
    os._exit(0)
    """
    started = time.monotonic()
    with processes(script, tensor=1, stages=2, timeout_s=3) as (_, second):
        assert output(second).startswith("no hidden states from rank 0 within 3 s (engine.step_timeout): ")
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
