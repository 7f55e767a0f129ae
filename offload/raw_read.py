"""How fast the store's files can be read at all: O_DIRECT reads with nothing else to do, the yardstick of streaming.

Plain threads with preadv, and the kernel's asynchronous reads; the best of both is what the disk gives. No torch.
"""

from __future__ import annotations

import errno
import itertools
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from offload.aligned import aligned_memory
from offload.check import finish_read
from offload.readers.aio import AioReader
from offload.readers.port import ReadFile
from partition.errors import ConfigError, StoreError
from partition.layout import ALIGN_BLOB

MEMORY_BYTES = 48 * 2**20
"""Every setting reads into all of it in turn, as streaming reads into its slots: a few buffers that are read into again
and again stay in the processor's cache, which is a third faster on a virtual disk (docs/decisions/0015). No more, so
that measuring fits beside a plan that uses its memory to the last slot."""

_Block = tuple[Path, int, int, int]  # path, descriptor, first byte, length
_JOIN_S = 60.0  # a read that takes longer than this hangs
_SWEEP_ROUNDS = 2
_NUM_BEST = 2


@dataclass(frozen=True, kw_only=True, order=True)
class RawSetting:
    """`num_in_flight` blocks of `block_bytes` are read at the same time: by a thread each, or by one of them (aio)."""

    method: Literal["threads", "aio"]
    num_in_flight: int
    block_bytes: int

    @property
    def name(self) -> str:
        return f"{self.method}, {self.num_in_flight} × {self.block_bytes // 2**10} KiB"

    @property
    def num_bytes(self) -> int:
        """Of buffers. Asynchronous reads are queued twice as deep, so that the kernel never runs dry."""
        return self.num_in_flight * self.block_bytes * (2 if self.method == "aio" else 1)


SETTINGS = (
    RawSetting(method="threads", num_in_flight=2, block_bytes=2**20),
    RawSetting(method="threads", num_in_flight=2, block_bytes=4 * 2**20),
    RawSetting(method="threads", num_in_flight=4, block_bytes=2**20),
    RawSetting(method="threads", num_in_flight=4, block_bytes=4 * 2**20),
    RawSetting(method="threads", num_in_flight=8, block_bytes=2**20),
    RawSetting(method="threads", num_in_flight=8, block_bytes=4 * 2**20),
    RawSetting(method="threads", num_in_flight=16, block_bytes=2**19),
    RawSetting(method="aio", num_in_flight=8, block_bytes=2**20),
    RawSetting(method="aio", num_in_flight=16, block_bytes=2**20),
    RawSetting(method="aio", num_in_flight=32, block_bytes=2**19),
)


@dataclass(frozen=True, kw_only=True)
class RawRate:
    """What one setting reached."""

    setting: RawSetting
    bytes_per_s: float


class RawRead:
    """Reads a store's files in order, over and over, each measurement from where the last one stopped.

    Owns its buffers and descriptors; a context manager. One thread uses it. Raises StoreError for a file that cannot be
    opened or read, and for a read that hangs.
    """

    def __init__(self, files: Sequence[Path], settings: Sequence[RawSetting] = SETTINGS) -> None:
        if any(each.num_bytes > MEMORY_BYTES for each in settings):
            raise ValueError(f"a setting needs more than {MEMORY_BYTES} bytes of buffers")
        self._stack = ExitStack()
        self._settings: list[RawSetting] = []
        self._aio: dict[RawSetting, AioReader] = {}
        self._fds: list[int] = []
        self._files: list[tuple[Path, int, int]] = []  # path, descriptor, bytes that can be read directly
        self._next = itertools.count()
        self.direct = True
        try:
            for path in files:
                self._open(path)
        except OSError as error:
            self.close()
            raise StoreError(f"the store's files cannot be measured: {error}") from error
        self._num_bytes = sum(length for *_, length in self._files)
        if self._num_bytes == 0:
            self.close()
            raise StoreError("the store has no bytes to measure a raw read with: pack it first")
        for setting in settings:
            self._prepare(setting)
        self._memory = aligned_memory(MEMORY_BYTES)
        self._memory[:] = bytes(MEMORY_BYTES)  # the first touch of memory is no business of the disk
        self._best: tuple[RawSetting, ...] = ()

    def sweep(self, seconds: float) -> tuple[RawRate, ...]:
        """Try every setting, interleaved, within `seconds` in all; `measure` uses the best of them. Best first."""
        each_s = seconds / (len(self._settings) * _SWEEP_ROUNDS)
        found: dict[RawSetting, list[float]] = {setting: [] for setting in self._settings}
        for _ in range(_SWEEP_ROUNDS):
            for setting in self._settings:
                found[setting].append(self._run(setting, each_s, 0))
        rates = [RawRate(setting=key, bytes_per_s=statistics.mean(values)) for key, values in found.items()]
        rates.sort(key=lambda rate: -rate.bytes_per_s)
        self._best = tuple(rate.setting for rate in rates[:_NUM_BEST])
        return tuple(rates)

    def measure(self, seconds: float, settle_bytes: int = 0, in_cache: bool = False) -> RawRate:
        """The faster of the sweep's best settings, measured again now, within `seconds` in all.

        settle_bytes: read so much first without counting it, so that what others still read ahead is over.
        in_cache: read into as few buffers as are in flight, over and over: what never gets to memory.
        """
        if not self._best:
            raise RuntimeError("sweep before measure")
        if settle_bytes:
            self._run(self._best[0], _JOIN_S, settle_bytes)
        rates = [
            RawRate(setting=setting, bytes_per_s=self._run(setting, seconds / len(self._best), 0, in_cache))
            for setting in self._best
        ]
        return max(rates, key=lambda rate: rate.bytes_per_s)

    def close(self) -> None:
        """Idempotent."""
        self._stack.close()
        for fd in self._fds:
            os.close(fd)
        self._fds, self._files = [], []

    def __enter__(self) -> RawRead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd, self.direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
        self._fds.append(fd)
        length = os.fstat(fd).st_size // ALIGN_BLOB * ALIGN_BLOB
        if length:
            self._files.append((path, fd, length))

    def _prepare(self, setting: RawSetting) -> None:
        """Asynchronous reads are tried where the kernel has them."""
        if setting.method == "aio":
            try:
                self._aio[setting] = AioReader(setting.num_in_flight, setting.block_bytes)
            except ConfigError:
                return
            self._stack.callback(self._aio[setting].close)
        self._settings.append(setting)

    def _run(self, setting: RawSetting, seconds: float, num_bytes: int, in_cache: bool = False) -> float:
        """Bytes per second of `seconds` of reading, or of `num_bytes` if that is less."""
        blocks = [
            (path, fd, start, min(setting.block_bytes, length - start))
            for path, fd, length in self._files
            for start in range(0, length, setting.block_bytes)
        ]
        size = setting.block_bytes
        num_buffers = (setting.num_bytes if in_cache else MEMORY_BYTES) // size
        buffers = [self._memory[i * size : (i + 1) * size] for i in range(num_buffers)]
        if setting.method == "aio":
            return self._run_aio(setting, blocks, buffers, seconds, num_bytes)
        return self._run_threads(setting, blocks, buffers, seconds, num_bytes)

    def _run_aio(
        self,
        setting: RawSetting,
        blocks: Sequence[_Block],
        buffers: Sequence[memoryview],
        seconds: float,
        num_bytes: int,
    ) -> float:
        reader, free, most = self._aio[setting], deque(buffers), setting.num_bytes // setting.block_bytes
        reading: deque[tuple[Future[int], Path, int, memoryview]] = deque()
        num_read, started = 0, time.perf_counter()
        try:
            while True:
                more = time.perf_counter() - started < seconds and not num_read > num_bytes > 0
                while more and len(reading) < most:
                    path, _, start, length = blocks[next(self._next) % len(blocks)]
                    buffer = free.popleft()
                    reading.append((reader.submit(ReadFile(path), start, length, buffer), path, length, buffer))
                if not reading:
                    return num_read / max(1e-9, time.perf_counter() - started)
                future, path, length, buffer = reading.popleft()
                finish_read(future, "measurement", path, length, _JOIN_S)
                num_read += length
                free.append(buffer)
        finally:
            for future, *_ in reading:
                future.cancel()

    def _run_threads(
        self,
        setting: RawSetting,
        blocks: Sequence[_Block],
        buffers: Sequence[memoryview],
        seconds: float,
        num_bytes: int,
    ) -> float:
        stop, errors, done = threading.Event(), list[Exception](), list[tuple[int, float]]()
        started = time.perf_counter()
        deadline = started + seconds

        def work(first: int) -> None:
            num_read, own = 0, itertools.cycle(buffers[first :: setting.num_in_flight])
            try:
                while not stop.is_set() and time.perf_counter() < deadline:
                    buffer = next(own)
                    path, fd, start, length = blocks[next(self._next) % len(blocks)]
                    got = os.preadv(fd, [buffer[:length]], start)
                    if got == 0:
                        raise StoreError(f"{path} was cut off at byte {start} while it was measured: pack it again")
                    if not self.direct:
                        os.posix_fadvise(fd, start, got, os.POSIX_FADV_DONTNEED)
                    num_read += got
                    if num_bytes and num_read >= num_bytes / setting.num_in_flight:
                        break
            except Exception as error:
                errors.append(error)
            finally:
                done.append((num_read, time.perf_counter()))

        threads = [
            threading.Thread(target=work, args=(i,), daemon=True, name=f"raw-{i}") for i in range(setting.num_in_flight)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(0.0, deadline - time.perf_counter()) + _JOIN_S)
        finally:
            stop.set()  # an interrupted measurement ends with the blocks under way
        if any(thread.is_alive() for thread in threads):
            raise StoreError(f"a raw read of {setting.name} hangs for {_JOIN_S:.0f} s: check the disk (dmesg, iostat)")
        if errors:
            raise StoreError(f"the store's files cannot be measured: {errors[0]}") from errors[0]
        return sum(read for read, _ in done) / max(1e-9, max(end for _, end in done) - started)
