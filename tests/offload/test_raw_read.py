"""Raw reads: all files, within the memory limit, with an error for what cannot be read."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from offload.raw_read import MEMORY_BYTES, SETTINGS, RawRead, RawSetting
from partition.errors import StoreError

SMALL = (
    RawSetting(method="threads", num_in_flight=2, block_bytes=8192),
    RawSetting(method="threads", num_in_flight=1, block_bytes=4096),
)
AIO = RawSetting(method="aio", num_in_flight=2, block_bytes=8192)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{index}.bin" for index in range(3)]
    for path in paths:
        path.write_bytes(os.urandom(5 * 4096))
    return paths


def test_settings_fit_the_memory_that_is_left_for_them() -> None:
    """Guards a measurement inside a memory cgroup that the plan has filled to the last slot."""
    assert all(setting.num_bytes <= MEMORY_BYTES <= 64 * 2**20 for setting in SETTINGS)
    with pytest.raises(ValueError, match="buffers"):
        RawRead([], [RawSetting(method="threads", num_in_flight=64, block_bytes=2**20)])


def test_every_file_is_read_and_nothing_is_left_behind(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against measuring one small file that a disk's cache holds; and against leaked threads."""
    seen: set[tuple[int, int]] = set()
    preadv = os.preadv

    def spy(fd: int, buffers: list[memoryview], offset: int) -> int:
        seen.add((fd, offset))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    with RawRead(files, SMALL) as raw:
        rates = raw.sweep(0.05)
        assert {rate.setting for rate in rates} == set(SMALL)
        assert rates[0].bytes_per_s >= rates[1].bytes_per_s > 0
        wanted = {(fd, start) for fd in raw._fds for start in range(0, 5 * 4096, 8192)}
        for _ in range(100):  # a busy machine reads few in so short a time
            if wanted <= seen:
                break
            raw.sweep(0.05)
        assert wanted <= seen
        assert raw.measure(0.02, settle_bytes=4 * 8192).setting in SMALL
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("raw-")]


def test_files_that_cannot_be_read_end_it(files: list[Path], tmp_path: Path) -> None:
    """Guards against a rate of zero, or an endless loop, where a blob is cut off or gone."""
    with pytest.raises(StoreError, match=r"absent\.bin"):
        RawRead([*files, tmp_path / "absent.bin"], SMALL)
    with pytest.raises(StoreError, match="no bytes"):
        RawRead([], SMALL)
    with RawRead(files, SMALL) as raw:
        os.truncate(files[1], 0)
        with pytest.raises(StoreError, match=r"1\.bin was cut off"):
            raw.sweep(0.05)


def test_asynchronous_reads_are_bounded_and_leave_nothing_behind(files: list[Path]) -> None:
    """Guards against reads that go on writing to memory after the measurement, and against a leaked thread."""
    others = set(threading.enumerate())  # an engine that other tests share has its readers
    with RawRead(files, [*SMALL, AIO]) as raw:
        rates = {rate.setting: rate.bytes_per_s for rate in raw.sweep(0.06)}
        assert rates.keys() >= set(SMALL)
        assert all(rate > 0 for rate in rates.values())
        os.truncate(files[0], 0)
        if AIO in rates:  # where the kernel has none, threads alone are measured
            with pytest.raises(StoreError, match=r"0\.bin"):
                raw._run(AIO, 0.05, 0)
    left = set(threading.enumerate()) - others
    assert not [thread for thread in left if thread.name.startswith(("raw-", "reader-aio"))]
