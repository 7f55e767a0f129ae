"""Sums in shared memory: those of gloo, the same bits everywhere, no peer that is waited for in vain, nothing left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_processes import output, processes

from dist_infer.worker import shm_reduce

pytestmark = pytest.mark.slow
SHARED = Path("/dev/shm")


def files() -> set[Path]:
    return set(SHARED.glob("*dist-infer-sums-*"))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = files()
    yield
    assert files() == before


def test_sums_are_those_of_gloo_and_the_same_bits_on_all_ranks() -> None:
    """From one element to a few pieces, of lengths that no vector divides; other types go by gloo."""
    script = """
    group, _ = join()
    by_gloo, digests = collectives.TensorGroup(group._group, range(tensor), rank), []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for size in (1, 3, 31, 33, 4096, 262145, 700001):
            torch.manual_seed(rank + size)
            own = torch.randn(size).to(dtype)
            found, wanted = group.all_reduce(own.clone()), by_gloo.all_reduce(own.clone())
            # gloo rounds after each of the two additions, the other way once
            bound = {torch.float64: 0, torch.float32: 1e-6}.get(dtype, 3 * torch.finfo(dtype).eps)
            torch.testing.assert_close(found, wanted, rtol=bound, atol=2 * bound)
            digests.append(hash(found.view(torch.uint8).numpy().tobytes()))
    empty = group.all_reduce(torch.ones(0, 5))
    columns = group.all_reduce((torch.arange(6.).reshape(2, 3) * (rank + 1)).t())
    print(group.sums, len(empty), columns.tolist(), digests, flush=True)
    collectives.disconnect()
    """
    with processes(script, tensor=3, environment={"PYTHONHASHSEED": "0"}) as ranks:
        found = {output(rank) for rank in ranks}
    assert len(found) == 1
    assert found.pop().startswith("sums in shared memory 0 [[0.0, 18.0], [6.0, 24.0], [12.0, 30.0]] [")


def test_ranks_of_two_stages_add_up_among_themselves_in_little_memory_without_a_name() -> None:
    """The operator's own files are of 66 MiB and stay in /dev/shm."""
    script = """
    group, link = join()
    for _ in range(50):
        total = group.all_reduce(torch.full((2_000_000,), float(rank)))
    mapped = [line.split() for line in open("/proc/self/maps") if "dist-infer-sums" in line]
    unnamed = all(fields[-1] == "(deleted)" for fields in mapped)
    held = [os.stat(f"/proc/self/map_files/{fields[0]}").st_blocks * 512 for fields in mapped]
    print(group.sums, total.unique().item(), unnamed, len(held), max(held) <= 3 << 20, flush=True)
    collectives.disconnect()
    """
    with processes(script, tensor=2, stages=2) as ranks:
        found = [output(rank) for rank in ranks]
    assert found == [f"sums in shared memory {total} True 3 True" for total in (1.0, 1.0, 5.0, 5.0)]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process of tensor rank 1 has ended"),
        (
            "os.kill(os.getpid(), signal.SIGSTOP)",
            "tensor rank 1 has not come to a sum within 5 s",
        ),
    ],
    ids=["killed", "stopped"],
)
def test_a_peer_that_does_not_come_is_an_error_with_its_name(how: str, words: str) -> None:
    """The operator itself would spin for ever."""
    script = f"""
    group, _ = join()
    for _ in range(3):
        group.all_reduce(torch.ones(4))
    if rank == 1:
        {how}
    try:
        group.all_reduce(torch.ones(4))
    except ClusterError as error:
        print(error, flush=True)
    os._exit(0)
    """
    with processes(script, tensor=2, timeout_s=5) as (first, _):
        assert output(first).startswith(words)


def test_a_peer_that_dies_within_a_sum_ends_this_rank_at_the_deadline() -> None:
    """The few microseconds in which nobody looks: no process may spin on after them, its coordinator gone or not."""
    script = """
    group, _ = join()
    group.all_reduce(torch.ones(4))
    if rank == 1:
        group._shared._gate.meet()
        os.kill(os.getpid(), signal.SIGKILL)
    print("in", flush=True)
    group.all_reduce(torch.ones(4))
    print("out", flush=True)
    """
    with processes(script, tensor=2, timeout_s=5) as (first, second):
        assert output(first) == "in"
        assert first.returncode == -signal.SIGALRM
        assert second.wait(10) == -signal.SIGKILL


def test_other_threads_of_a_rank_run_while_it_waits_for_a_peer() -> None:
    """A heartbeat must be answered: a rank that waits is not silent."""
    script = """
    import threading
    group, _ = join()
    group.all_reduce(torch.ones(4))
    if rank == 1:
        store.wait(["answered"])
    else:
        def answer():
            time.sleep(0.3)
            store.set("answered", "yes")
        threading.Thread(target=answer).start()
    print(group.all_reduce(torch.ones(1)).item(), flush=True)
    collectives.disconnect()
    """
    with processes(script, tensor=2, timeout_s=10) as ranks:
        assert [output(rank) for rank in ranks] == ["2.0", "2.0"]


SUM = """
group, _ = join()
print(group.all_reduce(torch.ones(1)).item(), group.sums, flush=True)
collectives.disconnect()
"""


def test_where_the_operator_is_not_built_gloo_does_it_and_the_command_is_said(tmp_path: Path) -> None:
    with processes(SUM, tensor=2, environment={"TORCH_EXTENSIONS_DIR": str(tmp_path)}) as ranks:
        found = {output(rank) for rank in ranks}
    assert found == {
        "2.0 sums by gloo (the shared-memory sum is not built: run `python -m dist_infer.build_ops`)",
    }


@pytest.mark.parametrize(
    ("size", "words"),
    [("1g", ["the ranks do not share /dev/shm"] * 2), ("64m", ["not all ranks can", "/dev/shm has 64 MiB free"])],
    ids=["another machine", "too little"],
)
def test_ranks_that_do_not_share_memory_add_up_by_gloo(size: str, words: list[str]) -> None:
    """Rank 1 with a /dev/shm of its own, as on another machine or in another container. Needs root, as CI is."""
    own = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
    with processes(SUM, tensor=2, wrap={1: own}) as ranks:
        for rank, reason in zip(ranks, words, strict=True):
            assert output(rank).startswith(f"2.0 sums by gloo ({reason}")


def test_files_of_ranks_that_were_killed_while_they_made_them_are_removed() -> None:
    old, new = (SHARED / f"deepspeed_allreduce_buffer_0_dist-infer-sums-test{name}_0_0" for name in ("old", "new"))
    try:
        for path in (old, new):
            path.touch()
        os.utime(old, (1e9, 1e9))
        shm_reduce.remove_stale(1e9 + 10)
        assert not old.exists()
        assert new.exists(), "of a run that is starting now"
    finally:
        new.unlink()
