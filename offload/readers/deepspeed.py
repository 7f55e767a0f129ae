"""DeepSpeed's async_io behind the port. `python -m offload.readers.deepspeed` builds it.

What the operator leaves open is closed here:
- It never looks at the results of its reads. The last bytes of each of its blocks are set to a random mark before, and
  a mark that is still there afterwards means that the block did not come whole; it is read again with `preadv`, which
  knows the error. The size of the file is compared before and after. Checksums are on top of that, by policy.
- It opens files by name. It gets /proc/self/fd/N of the descriptor kept here, so a replaced file is not mixed in.
- A range beyond the end of the file, memory that may not be locked, no room for its contexts: each would abort the
  process. All of it is looked at before.
- `wait()` waits for all reads of a handle: each thread has a handle of its own, with one read at a time.
- Into memory that CUDA has not pinned it reads through a buffer it allocates and locks anew each time. Here the buffer
  is allocated once for each thread. The copy costs about a quarter of a second of processor time per GB.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import sys

from offload.aligned import address_of, aligned_memory
from offload.readers.aio_kernel import check_room
from offload.readers.blocks import BlockProgress, read_block
from offload.readers.deepspeed_ops import BUILD_COMMAND, AioOp, build_ops, load_op
from offload.readers.open_files import OpenFile
from offload.readers.pool import BlockPool
from offload.readers.ranges import check_block_bytes
from partition.errors import ConfigError, DistInferError

BLOCK_BYTES = 4 * 2**20
IO_BYTES = 2**20
NUM_THREADS = 4
QUEUE_DEPTH = 8

_MARK_BYTES = 16


class DeepSpeedReader(BlockPool):
    """See the module. Every thread takes blocks of `block_bytes`, which async_io cuts into reads of `io_bytes`.

    Owns `num_threads * block_bytes` of locked memory until `close`. `op` is for tests: the operator to use.
    Raises ConfigError when the operator is not built or the machine does not let it work.
    """

    def __init__(
        self,
        num_threads: int = NUM_THREADS,
        block_bytes: int = BLOCK_BYTES,
        io_bytes: int = IO_BYTES,
        op: AioOp | None = None,
    ) -> None:
        check_block_bytes(block_bytes)
        check_block_bytes(io_bytes)
        if num_threads < 1:
            raise ValueError("a reader without threads reads nothing")
        used = op or load_op()
        _check_lockable(num_threads * block_bytes)
        check_room(num_threads * 2 * QUEUE_DEPTH)  # each handle has two contexts
        self._reads = [_DeepSpeedRead(used, block_bytes, io_bytes) for _ in range(num_threads)]
        super().__init__("deepspeed", block_bytes, self._reads)

    def close(self) -> None:
        """See Reader.close. Locked memory of a thread stuck in the kernel stays with it."""
        super().close()
        if not self.is_working:
            for read in self._reads:
                read.close()
            self._reads.clear()


class _DeepSpeedRead:
    """One thread's handle and buffer."""

    def __init__(self, op: AioOp, block_bytes: int, io_bytes: int) -> None:
        import torch

        self._torch = torch
        self._io_bytes = io_bytes
        self._handle = op.aio_handle(io_bytes, QUEUE_DEPTH, True, False, 1)
        self._staging = self._handle.new_cpu_locked_tensor(block_bytes, torch.empty(0, dtype=torch.uint8))
        self._memory = memoryview((ctypes.c_char * block_bytes).from_address(self._staging.data_ptr())).cast("B")
        self._mark = secrets.token_bytes(_MARK_BYTES)

    def __call__(self, progress: BlockProgress, opened: OpenFile) -> None:
        """See BlockRead: with async_io where that can work, and what it did not bring with `preadv`."""
        wanted = progress.wanted
        length = progress.end - progress.start
        end = wanted.offset + progress.end
        if length and opened.direct and os.fstat(opened.fd).st_size >= end:
            into = wanted.into[progress.start : progress.end]
            num_whole = self._read(into, opened.fd, wanted.offset + progress.start)
            if os.fstat(opened.fd).st_size < end:
                num_whole = 0  # cut off meanwhile: what lies behind the end is not known
            if num_whole:
                progress.got(num_whole, direct=True)
            if not progress.done:
                progress.count_retry()
        read_block(progress, opened)

    def close(self) -> None:
        """Unlock and free the buffer; nothing reads any more."""
        self._memory.release()
        self._handle.free_cpu_locked_tensor(self._staging)

    def _read(self, into: memoryview, fd: int, offset: int) -> int:
        """Read into all of `into`; how many of its first bytes have come for sure."""
        length = into.nbytes
        own = self._torch.frombuffer(into, dtype=self._torch.uint8)
        pinned = self._handle.is_pinned(own)  # by CUDA, or by the operator itself
        target = into if pinned else self._memory[:length]
        ends = [min(start + self._io_bytes, length) for start in range(0, length, self._io_bytes)]
        for end in ends:
            target[end - _MARK_BYTES : end] = self._mark
        tensor = own if pinned else self._torch.frombuffer(target, dtype=self._torch.uint8)
        if self._handle.pread(tensor, f"/proc/self/fd/{fd}", False, False, offset) != 1:
            return 0
        num_whole = 0
        for end in ends:
            if target[end - _MARK_BYTES : end] == self._mark:
                break
            num_whole = end
        if num_whole and not pinned:
            ctypes.memmove(address_of(into), address_of(target), num_whole)  # lets other threads run, unlike a slice
        return num_whole


def _check_lockable(num_bytes: int) -> None:
    """async_io aborts the process when it may not lock its buffers. Raises ConfigError."""
    memory = aligned_memory(num_bytes)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(address_of(memory))
    if libc.mlock(address, ctypes.c_size_t(num_bytes)) != 0:
        raise ConfigError(
            f"reader deepspeed needs {num_bytes // 2**20} MiB of locked memory and may not have it "
            f"({os.strerror(ctypes.get_errno())}): raise `ulimit -l`, or use `reader: threads`"
        )
    libc.munlock(address, ctypes.c_size_t(num_bytes))


def main() -> int:
    """Build the operator, and make a reader of it."""
    try:
        directory = build_ops()
        DeepSpeedReader().close()
    except DistInferError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{BUILD_COMMAND}: async_io is in {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
