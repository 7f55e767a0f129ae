"""T15 to T17 at the port: EIO, short, late, doubled and lost reads of every reader, below a real streamer.

Blocking reads are changed at os.preadv, the asynchronous ones between the reader and the kernel or the operator.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

import pytest
import torch

from offload.aligned import aligned_memory
from offload.readers.aio import AioReader
from offload.readers.aio_kernel import AioEvent, AioKernel
from offload.readers.deepspeed import DeepSpeedReader
from offload.readers.deepspeed_ops import load_op
from offload.readers.port import ReadFile
from offload.readers.scripted import AfterOther, ErrorNumber, ScriptedReader, Twice
from offload.readers.threads import ThreadReader
from offload.slots import SlotState
from offload.streamer import Streamer
from partition.errors import StoreError

BLOCK = 4096
NUM_UNITS = 5
GARBAGE = 0xEE


@pytest.fixture(scope="module")
def store(tmp_path_factory, kit):
    """(directory, blobs in order of use, units)."""
    directory = tmp_path_factory.mktemp("store")
    units = kit.random_units(NUM_UNITS)
    manifest = kit.packed(directory, units)
    return directory, [manifest.blob(unit, 0) for unit in units], units


def streamer_of(store, reader, timeout_s=20.0):
    """Checksums are off: what the reader lets through would be computed with."""
    streamer = Streamer(
        directory=store[0],
        blobs=store[1],
        tiers=["nvme"] * NUM_UNITS,
        reader=reader,
        num_slots=3,
        num_device_slots=0,
        verify="never",
        read_timeout_s=timeout_s,
        poison=True,
    )
    streamer.load(lambda done, total: None)
    return streamer


def walk(store, kit, streamer, num_passes=2):
    """Every unit's bytes are right as long as no error comes; the number of units seen."""
    num_seen = 0
    for _ in range(num_passes):
        for index, shards in enumerate(store[2].values()):
            views = streamer.wait(index)
            assert all(kit.same_bits(views[name], tensor) for name, tensor in shards[0].items())
            num_seen += 1
            streamer.release(index)
    return num_seen


class FaultyKernel(AioKernel):
    """Real reads, whose ends are reported otherwise: `faults` by number of the read, or of "all"."""

    def __init__(self, depth, eventfd, faults):
        super().__init__(depth, eventfd)
        self.faults = faults
        self.num_reads = 0
        self.reads = {}
        self.lost = []
        self.late = []
        self.again = []
        self.has_lost = threading.Event()

    def read(self, ticket, fd, address, num_bytes, offset):
        fault = self.faults.get(self.num_reads, self.faults.get("all"))
        self.num_reads += 1
        self.reads[ticket] = (fault, address, num_bytes)
        super().read(ticket, fd, address, num_bytes, offset)

    def events(self):
        if self.lost:
            self.has_lost.set()
        events, self.late = self.late, []
        for event in super().events():
            fault, address, num_bytes = self.reads[event.ticket]
            events += self.again
            self.again = []
            if fault == "eio":
                ctypes.memset(address, GARBAGE, num_bytes)
                events.append(AioEvent(event.ticket, -errno.EIO))
            elif fault == "short":
                ctypes.memset(address + 700, GARBAGE, num_bytes - 700)
                events.append(AioEvent(event.ticket, 700))
            elif fault == "never":
                self.lost.append(event)
                os.eventfd_write(self._eventfd, 1)
            elif fault == "twice":
                self.again = [event]  # once more with the end of the next read
                events += [event, event]
            elif fault == "late":
                self.late.append(event)
                os.eventfd_write(self._eventfd, 1)
            else:
                events.append(event)
        return events


def aio_with(faults, depth=4):
    kernels = []

    def make(depth, eventfd):
        kernels.append(FaultyKernel(depth, eventfd, faults))
        return kernels[-1]

    return AioReader(depth=depth, block_bytes=BLOCK, kernel=make), kernels[0]


class FaultyHandle:
    """Does not bring what it says, as the operator does when a read inside of it fails."""

    def __init__(self, handle, op):
        self.handle = handle
        self.op = op

    def is_pinned(self, buffer):
        return self.handle.is_pinned(buffer)

    def new_cpu_locked_tensor(self, num_elem, example):
        return self.handle.new_cpu_locked_tensor(num_elem, example)

    def free_cpu_locked_tensor(self, tensor):
        return self.handle.free_cpu_locked_tensor(tensor)

    def pread(self, buffer, filename, validate, asynchronous, offset):
        self.op.targets.append(buffer.data_ptr())
        fault = self.op.next_fault()
        if fault == "refused":
            return -1
        before = buffer.clone()
        done = self.handle.pread(buffer, filename, validate, asynchronous, offset)
        if fault == "eio":
            buffer.copy_(before)
        elif fault == "short":
            buffer[700:].copy_(before[700:])
        return done


class FaultyOp:
    def __init__(self, faults):
        self.faults = faults
        self.num_reads = 0
        self.targets = []
        self.lock = threading.Lock()

    def next_fault(self):
        with self.lock:
            self.num_reads += 1
            return self.faults.get(self.num_reads - 1, self.faults.get("all"))

    def aio_handle(self, *arguments):
        return FaultyHandle(load_op().aio_handle(*arguments), self)


def faulty_preadv(monkeypatch, faults):
    """os.preadv that fails where told to."""
    real, lock, number = os.preadv, threading.Lock(), -1

    def preadv(fd, buffers, offset):
        nonlocal number
        with lock:
            number += 1
            fault = faults.get(number, faults.get("all"))
        if fault == "eio":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        got = real(fd, buffers, offset)
        if fault == "short":
            buffers[0][700:] = bytes([GARBAGE]) * (buffers[0].nbytes - 700)
            return 700
        return got

    monkeypatch.setattr(os, "preadv", preadv)


def reader_with(kind, faults, monkeypatch):
    if kind == "aio":
        return aio_with(faults)[0]
    if kind == "deepspeed":
        if faults.get("all") == "eio":
            faulty_preadv(monkeypatch, faults)  # a disk that fails, fails all ways of reading
        return DeepSpeedReader(num_threads=2, block_bytes=2 * BLOCK, io_bytes=BLOCK, op=FaultyOp(faults))
    faulty_preadv(monkeypatch, faults)
    return ThreadReader(num_threads=2, block_bytes=BLOCK)


KINDS = pytest.mark.parametrize("kind", ["threads", "aio", "deepspeed"])


@KINDS
@pytest.mark.parametrize("faults", [{0: "eio"}, {3: "eio", 9: "eio"}, {2: "short"}, {1: "short", 7: "eio"}])
def test_a_read_that_fails_once_is_read_again_and_counted(store, kit, monkeypatch, kind, faults):
    """Without a checksum: garbage, or the slot's NaN, behind what was read would be seen."""
    reader = reader_with(kind, faults, monkeypatch)
    streamer = streamer_of(store, reader)
    assert walk(store, kit, streamer) == 2 * NUM_UNITS
    assert streamer.snapshot().num_read_retries == len(faults)
    streamer.close()
    reader.close()


@KINDS
def test_a_disk_that_fails_for_good_is_an_error_and_no_unit(store, kit, monkeypatch, kind):
    reader = reader_with(kind, {"all": "eio"}, monkeypatch)
    streamer = streamer_of(store, reader)
    with pytest.raises(StoreError, match=r"layers\.0.*Input/output error"):
        walk(store, kit, streamer)
    assert reader.num_retries >= 2
    streamer.close()
    assert set(streamer.slot_states) <= {SlotState.FREE}
    reader.close()


@pytest.mark.parametrize("faults", [{"all": "twice"}, {0: "late", 1: "late", 5: "late"}, {4: "twice", 5: "late"}])
def test_ends_that_come_twice_or_out_of_order_change_nothing(store, kit, faults):
    """An end reported again must not be taken for the end of the next read with the same place in the queue."""
    reader, _ = aio_with(faults, depth=2)
    streamer = streamer_of(store, reader)
    assert walk(store, kit, streamer, num_passes=4) == 4 * NUM_UNITS
    streamer.close()
    reader.close()


def test_an_end_that_comes_twice_does_not_end_the_next_read(tmp_path):
    """Which has the same place in the queue, and may still be under way."""
    (tmp_path / "f").write_bytes(os.urandom(2 * BLOCK))
    reader, kernel = aio_with({0: "twice", 1: "never"}, depth=1)
    assert reader.submit(ReadFile(tmp_path / "f"), 0, BLOCK, aligned_memory(BLOCK)).result(10) == BLOCK
    second = reader.submit(ReadFile(tmp_path / "f"), BLOCK, BLOCK, aligned_memory(BLOCK))
    assert kernel.has_lost.wait(10)
    assert not second.done()
    kernel.late += kernel.lost
    os.eventfd_write(kernel._eventfd, 1)
    assert second.result(10) == BLOCK
    reader.close()


def test_a_read_whose_end_never_comes_hits_the_deadline_and_keeps_its_memory(store, kit, monkeypatch):
    """The kernel may still write: the memory must outlive streamer and reader."""
    monkeypatch.setattr("offload.readers.aio.CLOSE_TIMEOUT_S", 0.1)
    reader, kernel = aio_with({1: "never"})
    streamer = streamer_of(store, reader, timeout_s=0.1)
    with pytest.raises(StoreError, match=r"was not done after 0\.1 s"):
        walk(store, kit, streamer)
    with pytest.raises(StoreError, match="still under way"):
        streamer.close()
    reader.close()
    assert reader._thread.is_alive()
    let_go(kernel, reader)


def let_go(kernel, reader):
    """The disk answers after all: the thread ends."""
    kernel.late += kernel.lost
    os.eventfd_write(kernel._eventfd, 1)
    reader._thread.join(10)
    assert not reader._thread.is_alive()
    kernel.close()
    reader._files.close()
    os.close(kernel._eventfd)


def test_memory_of_a_lost_read_cannot_go_away(tmp_path, monkeypatch):
    monkeypatch.setattr("offload.readers.aio.CLOSE_TIMEOUT_S", 0.05)
    (tmp_path / "f").write_bytes(os.urandom(BLOCK))
    reader, kernel = aio_with({0: "never"})
    memory = mmap.mmap(-1, BLOCK)
    begun = threading.Event()
    future = reader.submit(ReadFile(tmp_path / "f"), 0, BLOCK, memoryview(memory), begun.set)
    assert begun.wait(10)
    reader.close()
    with pytest.raises(BufferError):
        memory.close()
    let_go(kernel, reader)
    assert future.result(0) == BLOCK


def test_an_operator_that_refuses_is_not_waited_for(store, kit):
    """wait() after a refused read would abort the process."""
    reader = DeepSpeedReader(num_threads=1, block_bytes=2 * BLOCK, io_bytes=BLOCK, op=FaultyOp({"all": "refused"}))
    streamer = streamer_of(store, reader)
    assert walk(store, kit, streamer) == 2 * NUM_UNITS
    assert reader.num_retries > 0
    streamer.close()
    reader.close()


def test_the_operator_is_never_asked_for_bytes_behind_the_end(tmp_path):
    """It would abort the process."""
    (tmp_path / "f").write_bytes(os.urandom(BLOCK + 100))
    op = FaultyOp({})
    reader = DeepSpeedReader(num_threads=1, block_bytes=2 * BLOCK, io_bytes=BLOCK, op=op)
    with pytest.raises(StoreError, match=f"at byte {BLOCK + 100}"):
        reader.submit(ReadFile(tmp_path / "f"), 0, 2 * BLOCK, aligned_memory(2 * BLOCK)).result(5)
    assert op.num_reads == 0
    reader.close()


def test_the_operator_reads_the_file_that_was_opened(tmp_path):
    """It opens files by name at each read; another file under that name must not be mixed in."""
    data = os.urandom(2 * BLOCK)
    (tmp_path / "f").write_bytes(data)
    op = FaultyOp({})
    reader = DeepSpeedReader(num_threads=1, block_bytes=BLOCK, io_bytes=BLOCK, op=op)
    into = aligned_memory(2 * BLOCK)
    reader.submit(ReadFile(tmp_path / "f"), 0, BLOCK, into).result(5)
    (tmp_path / "f").unlink()
    (tmp_path / "f").write_bytes(bytes(2 * BLOCK))
    reader.submit(ReadFile(tmp_path / "f"), BLOCK, BLOCK, into[BLOCK:]).result(5)
    assert into == data
    assert (op.num_reads, reader.num_retries) == (2, 0)
    reader.close()


@pytest.mark.parametrize("faults", [{}, {1: "eio"}, {0: "short"}])
def test_pinned_memory_is_read_into_without_a_copy_and_with_the_same_checks(tmp_path, faults):
    """Locked by the operator here, by CUDA where there is one."""
    data = os.urandom(4 * BLOCK)
    (tmp_path / "f").write_bytes(data)
    op = FaultyOp(faults)
    handle = load_op().aio_handle(BLOCK, 1, True, False, 1)
    locked = handle.new_cpu_locked_tensor(4 * BLOCK, torch.empty(0, dtype=torch.uint8))
    into = memoryview((ctypes.c_char * (4 * BLOCK)).from_address(locked.data_ptr())).cast("B")
    reader = DeepSpeedReader(num_threads=1, block_bytes=2 * BLOCK, io_bytes=BLOCK, op=op)
    assert reader.submit(ReadFile(tmp_path / "f"), 0, 4 * BLOCK, into).result(5) == 4 * BLOCK
    assert into == data
    assert op.targets == [locked.data_ptr(), locked.data_ptr() + 2 * BLOCK]
    assert reader.num_retries == len(faults)
    reader.close()
    into.release()
    handle.free_cpu_locked_tensor(locked)


@pytest.mark.parametrize(
    "script",
    [{0: AfterOther(2), 3: AfterOther(4)}, {1: Twice(), 4: Twice()}, {0: AfterOther(1), 2: Twice()}],
)
def test_scripted_ends_out_of_order_or_twice_change_nothing(store, kit, script):
    streamer = streamer_of(store, ScriptedReader(script))
    assert walk(store, kit, streamer) == 2 * NUM_UNITS
    streamer.close()


@pytest.mark.parametrize("at", [0, 2, 6])
def test_an_error_number_is_never_taken_for_a_count(store, kit, at):
    streamer = streamer_of(store, ScriptedReader({at: ErrorNumber(errno.EIO)}))
    with pytest.raises(StoreError, match=f"brought -{errno.EIO} bytes"):
        walk(store, kit, streamer)
    streamer.close()
