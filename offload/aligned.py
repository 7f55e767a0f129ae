"""Page-aligned host memory without torch: what direct reads and the rings of slots are made of."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

from partition.layout import ALIGN_BLOB, round_up


def aligned_memory(num_bytes: int) -> memoryview:
    """Writable, zeroed, page-aligned memory of exactly `num_bytes` (0 is allowed).

    Anonymous memory of its own mapping: it goes back to the system as soon as the last view of it is gone, which the
    heap would not promise. The caller owns the view; slices keep the mapping alive.
    """
    memory = mmap.mmap(-1, max(round_up(num_bytes, ALIGN_BLOB), ALIGN_BLOB), flags=mmap.MAP_PRIVATE)
    with contextlib.suppress(OSError):  # a kernel without huge pages: slower page walks, nothing else
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:num_bytes]


def address_of(memory: memoryview) -> int:
    """Address of the first byte of writable, contiguous memory; 0 when it is empty."""
    if memory.nbytes == 0:
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
