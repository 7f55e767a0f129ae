"""Byte layout of a packed blob: where each tensor starts and how long the blob is. Pure arithmetic."""

from collections.abc import Sequence

ALIGN_TENSOR = 256
"""Bytes; every tensor starts at a multiple of it, which suits every dtype and the GPU's widest loads."""

ALIGN_BLOB = 4096
"""Bytes; a blob's length and every buffer that receives it are multiples of it, as direct reads require."""


def round_up(num_bytes: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `num_bytes`."""
    if num_bytes < 0 or alignment <= 0:
        raise ValueError(f"round_up needs num_bytes >= 0 and alignment > 0, got {num_bytes} and {alignment}")
    return -(-num_bytes // alignment) * alignment


def blob_layout(sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Place tensors of `sizes` bytes one after another.

    Returns `(offsets, length)` in bytes: offsets are multiples of ALIGN_TENSOR in the order given,
    length is a multiple of ALIGN_BLOB. A blob without tensors has length 0.

    Raises:
        ValueError: a size is negative.
    """
    offsets: list[int] = []
    end = 0
    for size in sizes:
        start = round_up(end, ALIGN_TENSOR)
        offsets.append(start)
        end = start + round_up(size, 1)
    return tuple(offsets), round_up(end, ALIGN_BLOB)
