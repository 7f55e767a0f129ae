"""How fast a reader reads a file, and what it costs the processor. The one measuring loop; no torch."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from offload.aligned import aligned_memory
from offload.check import finish_read
from offload.readers.port import Reader, ReadFile
from partition.errors import StoreError
from partition.layout import ALIGN_BLOB

RANGE_BYTES = 8 * 2**20
NUM_RANGES = 4
"""In flight at the same time; together with RANGE_BYTES this is what measuring needs of memory."""

_READ_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class ReadRate:
    """What one measurement found. `cpu_s` is the processor time of the whole process while it ran."""

    num_bytes: int
    seconds: float
    cpu_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_s / (self.num_bytes / 1e9)


class ReadMeasure:
    """Reads a file in order, over and over; each call goes on where the last one stopped. Owns 32 MiB of buffers.

    Raises:
        StoreError: the file is too short (4096 bytes are needed, several hundred MiB are better) or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._num_bytes = path.stat().st_size // ALIGN_BLOB * ALIGN_BLOB
        except OSError as error:
            raise StoreError(f"{path} cannot be measured: {error}") from error
        if self._num_bytes == 0:
            raise StoreError(f"{path} has less than {ALIGN_BLOB} bytes: measure with a larger file")
        self._path = path
        self._position = 0
        self._range_bytes = min(RANGE_BYTES, self._num_bytes)
        self._buffers = [aligned_memory(self._range_bytes) for _ in range(NUM_RANGES)]
        for buffer in self._buffers:
            buffer[:] = bytes(self._range_bytes)  # the first touch of memory is no business of the disk

    def run(self, reader: Reader, seconds: float) -> ReadRate:
        """Read with `reader` for about `seconds`, at least one range. Raises StoreError when a read fails."""
        file = ReadFile(self._path)
        free = list(self._buffers)
        reading: deque[tuple[Future[int], int, memoryview]] = deque()
        num_read = 0
        cpu_s = time.process_time()
        started = time.perf_counter()
        while reading or not num_read or time.perf_counter() - started < seconds:
            while free and (not num_read or time.perf_counter() - started < seconds):
                buffer = free.pop()
                length = min(self._range_bytes, self._num_bytes - self._position)
                reading.append((reader.submit(file, self._position, length, buffer), length, buffer))
                self._position = (self._position + length) % self._num_bytes
            if reading:
                future, length, buffer = reading.popleft()
                finish_read(future, "measurement", self._path, length, _READ_TIMEOUT_S)
                num_read += length
                free.append(buffer)
        seconds = time.perf_counter() - started
        return ReadRate(num_bytes=num_read, seconds=seconds, cpu_s=time.process_time() - cpu_s)
