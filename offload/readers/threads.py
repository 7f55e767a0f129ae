"""The default reader: a few threads doing direct preadv, each range cut into blocks that are read in parallel.

Direct reads keep weights out of the page cache, which a cyclic scan larger than memory would only churn.
"""

from __future__ import annotations

from offload.readers.blocks import read_block
from offload.readers.pool import BlockPool

# 11 to 28 % faster than four threads with blocks of 4 MiB on a busy two-core machine with a virtual disk, also beside a
# computing process (benchmarks/readers.py): as much in flight, in requests that the disk need not cut.
BLOCK_BYTES = 2**20
NUM_THREADS = 12


class ThreadReader(BlockPool):
    """See the module. `block_bytes` is a multiple of 4096; threads and descriptors live until `close`."""

    def __init__(self, num_threads: int = NUM_THREADS, block_bytes: int = BLOCK_BYTES) -> None:
        super().__init__("threads", block_bytes, [read_block] * num_threads)
