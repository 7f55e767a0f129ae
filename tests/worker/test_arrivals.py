"""The gate of shared-memory sums: nobody passes before all have come, nobody waits for ever."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_infer.worker.arrivals import Arrivals, memory_bytes
from partition.errors import ClusterError

SIZE = 3
LARGEST = 2**32 - 1


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, memory_bytes(SIZE)) as mapped:
        yield mapped


def test_nobody_passes_before_the_last_has_come_also_where_the_count_wraps(memory: mmap.mmap) -> None:
    """Each rank is a thread here. Who is ahead by one round must not be taken for one who is behind."""
    rounds, passed, lock = 300, [0] * SIZE, threading.Lock()
    words = memoryview(memory).cast("I")
    gates = [Arrivals(memory, rank, SIZE, 30.0) for rank in range(SIZE)]
    for rank in range(SIZE):
        words[rank * (len(words) // SIZE)] = LARGEST - rounds // 2

    def run(rank: int) -> None:
        for number in range(rounds):
            with lock:
                assert min(passed) >= number - 1
                passed[rank] = number
            gates[rank].meet()

    with ThreadPoolExecutor(SIZE) as pool:
        assert list(pool.map(run, range(SIZE))) == [None] * SIZE
    words.release()
    for gate in gates:
        gate.close()


def test_who_is_late_is_named_at_the_deadline(memory: mmap.mmap) -> None:
    gates = [Arrivals(memory, rank, SIZE, 0.3) for rank in range(SIZE)]
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(gates[1].meet)
        with pytest.raises(ClusterError, match=r"^tensor rank 2 has not come to a sum within 0\.3 s"):
            gates[0].meet()
        with pytest.raises(ClusterError, match=r"^tensor rank 2 has not come"):
            second.result()
    for gate in gates:
        gate.close()


def test_a_peer_whose_process_ends_is_named_long_before_the_deadline(memory: mmap.mmap) -> None:
    gate = Arrivals(memory, 0, 2, 60.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as peer:
        words = memoryview(memory).cast("I")
        words[len(words) // SIZE + 1] = peer.pid
        words.release()
        gate.watch_peers()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(gate.meet)
            peer.kill()
            with pytest.raises(ClusterError, match=r"^the process of tensor rank 1 has ended$"):
                waiting.result(30)
    gate.close()
