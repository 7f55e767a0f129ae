"""FAULTS T21: a packer that is killed at any time, alone or while another waits. What is on disk is never wrong."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.format import LOCK_FILE, MANIFEST_FILE, StoreKey, read_manifest
from offload.pack import PackProgress, pack_store, verify_store

pytestmark = pytest.mark.timeout(120)
KEY = StoreKey(fingerprint="f" * 16, model_type="llama", dtype="float32", encoding="float", tensor=1)
NUM_KILLS = 20


class Source:
    """Ten units of 128 KiB: a report before and after each."""

    units = tuple(f"layers.{number}" for number in range(10))

    def load_unit(self, unit: str) -> list[dict[str, torch.Tensor]]:
        return [{"w": torch.full((128, 256), float(unit.partition(".")[2]))}]


def pack(
    directory: Path, report: Callable[[PackProgress], None] = lambda progress: None, source: Source | None = None
) -> None:
    pack_store(directory, KEY, Source.units, [0], source or Source(), report, lock_timeout_s=30)


class Packer:
    """A process that packs; killed and reaped at the end of the block. `said`: a descriptor for a byte per report."""

    def __init__(self, directory: Path, said: int | None = None, source: Source | None = None) -> None:
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid:
            return

        def report(progress: PackProgress) -> None:
            if said is not None:
                os.write(said, b"w" if "waiting" in progress.message else b"p")

        code = 1
        try:
            torch.set_num_threads(1)  # the parent's pool of threads did not come along
            pack(directory, report, source)
            code = 0
        finally:
            os._exit(code)

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> int:
        """kill -9, unless it has ended; its exit code, negative for a signal."""
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end; its exit code, negative for a signal."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code


def assert_right_after_resuming(store: Path, digest: str) -> None:
    if (store / MANIFEST_FILE).exists():  # killed after the last rename, it is complete
        assert read_manifest(store).digest == digest
    pack(store)
    assert read_manifest(store).digest == digest
    assert verify_store(store, lambda done, total: None).bad == ()
    assert list(store.glob("*.tmp")) == []


def test_killed_at_twenty_random_points(tmp_path: Path) -> None:
    """kill -9 from outside, up to 5 ms after a random one of its 20 reports: mid-write, mid-fsync, between renames."""
    pack(tmp_path / "calm")
    digest = read_manifest(tmp_path / "calm").digest
    dice, pause = random.Random(21), threading.Event()
    num_killed = 0
    for number in range(NUM_KILLS):
        store = tmp_path / str(number)
        reading, writing = os.pipe()
        with Packer(store, writing) as packer:
            os.close(writing)
            for _ in range(dice.randrange(18)):
                os.read(reading, 1)
            pause.wait(dice.random() * 0.005)
            num_killed += packer.kill() == -signal.SIGKILL
        os.close(reading)
        assert_right_after_resuming(store, digest)
    assert num_killed >= NUM_KILLS // 2  # a fast disk may be done before


def test_killed_again_and_again_on_the_same_store(tmp_path: Path) -> None:
    """Each round goes on where the last was killed, and none begins anew: it ends, with the same store."""
    pack(tmp_path / "calm")
    store, dice = tmp_path / "store", random.Random(2)
    for _ in range(5):
        reading, writing = os.pipe()
        with Packer(store, writing) as packer:
            os.close(writing)
            for _ in range(dice.randint(2, 5)):
                os.read(reading, 1)
            assert packer.kill() in (-signal.SIGKILL, 0)
        os.close(reading)
    assert len(list(store.glob("*.bin"))) >= 5
    assert_right_after_resuming(store, read_manifest(tmp_path / "calm").digest)


def test_the_second_packer_goes_on_where_the_first_was_killed(tmp_path: Path) -> None:
    """The lock dies with its owner: who waited packs the rest, and nothing twice."""
    pack(tmp_path / "calm")
    store = tmp_path / "store"
    store.mkdir()
    held, waiting = os.pipe(), os.pipe()

    class Stuck(Source):
        """Packs four units, then says so and does nothing more."""

        def load_unit(self, unit: str) -> list[dict[str, torch.Tensor]]:
            if unit == "layers.4":
                os.write(held[1], b"h")
                signal.pause()
            return super().load_unit(unit)

    with Packer(store, source=Stuck()) as first:
        os.read(held[0], 1)
        finished = {path.name: path.stat().st_mtime_ns for path in store.glob("*.bin")}
        assert len(finished) == 4
        with Packer(store, waiting[1]) as second:
            assert os.read(waiting[0], 1) == b"w"
            assert len(list(store.glob("*.bin"))) == 4
            assert first.kill() == -signal.SIGKILL
            assert second.ended() == 0
    for descriptor in (*held, *waiting):
        os.close(descriptor)
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in store.glob("*.bin")}.items()
    assert read_manifest(store).digest == read_manifest(tmp_path / "calm").digest
    assert (store / LOCK_FILE).exists()  # a file is no lock: it stays, and holds nobody up
