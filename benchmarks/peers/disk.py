"""What the disk gives at this moment, past the page cache, and what it has given since the machine started."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_MIB = 1 << 20
_PAGE = 4096
# (threads, bytes a request): what fio's best settings on NVMe and on network disks have in common
_SETTINGS = ((4, 4 * _MIB), (8, 4 * _MIB), (8, 1 * _MIB))
_SECTOR_BYTES = 512  # of /proc/diskstats, whatever the device's own sectors are


def read_rate(file: Path, seconds: float = 2.0) -> float:
    """Bytes per second of O_DIRECT reads in ascending order, at the best of a few settings; `seconds` in all."""
    size = file.stat().st_size // _PAGE * _PAGE
    if not size:
        raise ValueError(f"{file} has less than a page of {_PAGE} bytes: measure with a larger file")
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        return max(
            _rate(
                threads,
                min(block, size),
                seconds / len(_SETTINGS),
                size,
                lambda view, at: os.preadv(descriptor, [view], at),
            )
            for threads, block in _SETTINGS
        )
    finally:
        os.close(descriptor)


def write_rate(folder: Path, seconds: float = 2.0) -> float:
    """Bytes per second of O_DIRECT writes into a file of 1 GiB that is removed again, and of its fsync."""
    file = folder / "write-rate.tmp"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        size = 1 << 30
        os.posix_fallocate(descriptor, 0, size)
        return _rate(
            8,
            4 * _MIB,
            seconds,
            size,
            lambda view, at: os.pwritev(descriptor, [view], at),
            lambda: os.fsync(descriptor),
        )
    finally:
        os.close(descriptor)
        file.unlink()


def _rate(
    num_threads: int,
    block: int,
    seconds: float,
    size: int,
    transfer: Callable[[mmap.mmap, int], int],
    finish: Callable[[], None] = lambda: None,
) -> float:
    offsets = itertools.count()  # its next() is atomic
    moved = [0] * num_threads
    buffers = [mmap.mmap(-1, block) for _ in range(num_threads)]  # page-aligned, as O_DIRECT wants it
    for buffer in buffers:
        buffer.write(os.urandom(_PAGE) * (block // _PAGE))
    blocks = size // block
    deadline = time.perf_counter() + seconds

    def work(mine: int) -> None:
        while time.perf_counter() < deadline:
            moved[mine] += transfer(buffers[mine], next(offsets) % blocks * block)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finish()
    return sum(moved) / (time.perf_counter() - started)


def device_bytes_read(folder: Path) -> int:
    """Bytes read so far from the block device of `folder`, by everybody on this machine; 0 where it is none."""
    device = folder.stat().st_dev
    wanted = (str(os.major(device)), str(os.minor(device)))
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if (fields[0], fields[1]) == wanted:
            return int(fields[5]) * _SECTOR_BYTES
    return 0


def drop_page_cache() -> bool:
    """Forget cached files, as after a start of the machine; False where that is not allowed (it takes root)."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True
