"""Every reader: complete reads or typed errors, in order, within its buffers."""

from __future__ import annotations

import os
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest

from offload.aligned import address_of, aligned_memory
from offload.readers.aio import AioReader
from offload.readers.deepspeed import DeepSpeedReader
from offload.readers.port import ReadFile
from offload.readers.threads import ThreadReader
from partition.errors import StoreError

BLOCK = 8192
PROC_MEM = Path("/proc/self/mem")


MAKERS = {
    "threads": lambda width: ThreadReader(num_threads=width, block_bytes=BLOCK),
    "aio": lambda width: AioReader(depth=width, block_bytes=BLOCK),
    "deepspeed": lambda width: DeepSpeedReader(num_threads=width, block_bytes=BLOCK, io_bytes=4096),
}


@pytest.fixture(params=MAKERS)
def make(request):
    """Makes a reader that has a number of blocks under way at once."""
    return MAKERS[request.param]


@pytest.fixture
def reader(make):
    reader = make(3)
    yield reader
    reader.close()


def random_file(path, num_bytes):
    data = os.urandom(num_bytes)
    path.write_bytes(data)
    return ReadFile(path), data


def test_ranges_of_several_blocks_arrive_complete(tmp_path, reader):
    file, data = random_file(tmp_path / "f", 10 * BLOCK + 4096)
    whole, part = aligned_memory(len(data)), aligned_memory(3 * BLOCK)
    first = reader.submit(file, 0, len(data), whole)
    second = reader.submit(file, 4096, 2 * BLOCK, part)
    assert (first.result(5), second.result(5)) == (len(data), 2 * BLOCK)
    assert whole == data
    assert part == data[4096 : 4096 + 2 * BLOCK] + bytes(BLOCK)  # not a byte beyond the range


def test_a_range_of_no_bytes_is_done_at_once(tmp_path, reader):
    assert reader.submit(random_file(tmp_path / "f", 1)[0], 0, 0, aligned_memory(0)).result(5) == 0


def test_what_is_not_aligned_is_refused_and_not_read(tmp_path, reader):
    file, _ = random_file(tmp_path / "f", BLOCK)
    for offset, length, into in [
        (1, 4096, aligned_memory(4096)),
        (0, 4095, aligned_memory(4096)),
        (0, 4096, aligned_memory(8192)[8:]),
        (0, 8192, aligned_memory(4096)),
    ]:
        with pytest.raises(ValueError, match="4096"):
            reader.submit(file, offset, length, into)


@pytest.mark.parametrize("size", [BLOCK, BLOCK + 4096, BLOCK + 5000, 1])
def test_a_file_that_ends_early_is_an_error_with_expected_and_got(tmp_path, reader, size):
    file, _ = random_file(tmp_path / "f", size)
    with pytest.raises(StoreError, match=rf"/f failed at byte {size}: .*wanted {4 * BLOCK} bytes from 0, got {size}\)"):
        reader.submit(file, 0, 4 * BLOCK, aligned_memory(4 * BLOCK)).result(5)


def test_a_missing_file_is_an_error_of_its_range_alone(tmp_path, reader):
    file, data = random_file(tmp_path / "f", BLOCK)
    lost = reader.submit(ReadFile(tmp_path / "gone"), 0, BLOCK, aligned_memory(BLOCK))
    into = aligned_memory(BLOCK)
    assert reader.submit(file, 0, BLOCK, into).result(5) == BLOCK
    assert into == data
    with pytest.raises(StoreError, match=r"gone.*cannot be opened"):
        lost.result(5)


def test_a_file_replaced_after_it_was_opened_is_not_mixed_in(tmp_path, reader):
    file, data = random_file(tmp_path / "f", 2 * BLOCK)
    into = aligned_memory(2 * BLOCK)
    reader.submit(file, 0, BLOCK, into).result(5)
    random_file(tmp_path / "new", 2 * BLOCK)
    (tmp_path / "new").rename(tmp_path / "f")
    reader.submit(file, BLOCK, BLOCK, into[BLOCK:]).result(5)
    assert into == data


def test_eio_is_tried_three_times_and_counted(reader):
    """/proc/self/mem answers EIO at unmapped addresses."""
    with pytest.raises(StoreError, match="Input/output error"):
        reader.submit(ReadFile(PROC_MEM), 0, 4096, aligned_memory(4096)).result(5)
    assert reader.num_retries == 2


def test_a_file_system_without_direct_reads_is_read_and_reported(reader):
    source, into = aligned_memory(4096), aligned_memory(4096)
    source[:] = os.urandom(4096)
    assert reader.submit(ReadFile(PROC_MEM), address_of(source), 4096, into).result(5) == 4096
    assert into == source
    assert not reader.direct


def test_before_runs_once_and_before_the_first_byte(tmp_path, reader):
    file, data = random_file(tmp_path / "f", 20 * BLOCK)
    into = aligned_memory(len(data))
    calls = []

    def before():
        calls.append(bytes(into) == bytes(len(data)))
        into[:] = b"\xff" * len(data)

    reader.submit(file, 0, len(data), into, before).result(5)
    assert calls == [True]
    assert into == data


def test_an_error_before_reading_ends_up_in_the_future(tmp_path, reader):
    file, _ = random_file(tmp_path / "f", 3 * BLOCK)
    into = aligned_memory(3 * BLOCK)

    def before():
        raise OSError("the copy failed")

    with pytest.raises(OSError, match="the copy failed"):
        reader.submit(file, 0, 3 * BLOCK, into, before).result(5)
    assert into == bytes(3 * BLOCK)


def test_close_cancels_what_waits_and_finishes_what_runs(tmp_path, make):
    file, data = random_file(tmp_path / "f", 2 * BLOCK)
    reader = make(1)
    go, running = threading.Event(), threading.Event()

    def hold():
        running.set()
        go.wait(5)

    first_into, second_into = aligned_memory(BLOCK), aligned_memory(2 * BLOCK)
    first = reader.submit(file, 0, BLOCK, first_into, hold)
    second = reader.submit(file, 0, 2 * BLOCK, second_into)
    third = reader.submit(file, 0, BLOCK, aligned_memory(BLOCK))
    assert third.cancel()
    assert running.wait(5)
    closing = threading.Thread(target=reader.close)
    closing.start()
    assert wait([second], timeout=5).done == {second}
    assert second.cancelled()
    go.set()
    closing.join(5)
    assert first.result(0) == BLOCK
    assert first_into == data[:BLOCK]
    assert second_into == bytes(2 * BLOCK)
    reader.close()
    with pytest.raises(RuntimeError, match="closed"):
        reader.submit(file, 0, BLOCK, first_into)


def test_descriptors_and_threads_are_given_back(tmp_path, make):
    file, _ = random_file(tmp_path / "f", BLOCK)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        reader = make(2)
        reader.submit(file, 0, BLOCK, aligned_memory(BLOCK)).result(5)
        reader.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_short_read_goes_on_and_stays_direct(tmp_path, monkeypatch):
    """The odd rest of a short read is read again from an aligned byte; garbage behind the count is not kept."""
    file, data = random_file(tmp_path / "f", 4 * BLOCK)
    whole = os.preadv
    num_short = 0

    def short(fd, buffers, offset):
        nonlocal num_short
        got = whole(fd, buffers, offset)
        if num_short < 2:
            num_short += 1
            buffers[0][5000:] = b"\xee" * (buffers[0].nbytes - 5000)
            return 5000
        return got

    reader = ThreadReader(num_threads=1, block_bytes=2 * BLOCK)
    into = aligned_memory(len(data))
    reader.submit(file, 0, 4096, aligned_memory(4096)).result(5)
    direct = reader.direct
    monkeypatch.setattr(os, "preadv", short)
    assert reader.submit(file, 0, len(data), into).result(5) == len(data)
    assert into == data
    assert reader.direct == direct
    reader.close()
