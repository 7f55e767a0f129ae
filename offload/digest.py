"""Checksums of packed bytes: xxh3_128, fast enough to check a disk at its own speed. Not a defence against forgery."""

from __future__ import annotations

import xxhash

PIECE_BYTES = 4 * 2**20
"""Bytes hashed per call, so that reader threads get their turn in between."""


class Digest:
    """A running checksum of bytes given in order."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, memory: memoryview) -> None:
        """Add contiguous bytes."""
        flat = memory.cast("B") if memory.nbytes else memory
        for start in range(0, flat.nbytes, PIECE_BYTES):
            self._state.update(flat[start : start + PIECE_BYTES])

    def hex(self) -> str:
        """32 hexadecimal digits of everything added so far."""
        return self._state.hexdigest()


def digest_of(memory: memoryview | bytes) -> str:
    """The checksum of one contiguous piece of memory."""
    digest = Digest()
    digest.update(memoryview(memory))
    return digest.hex()
