"""Arithmetic on bytes per tensor rank: one number for each rank of a stage."""

from __future__ import annotations

from collections.abc import Sequence

Bytes = tuple[int, ...]


def plus(first: Bytes, second: Bytes) -> Bytes:
    """Rank by rank."""
    return tuple(a + b for a, b in zip(first, second, strict=True))


def minus(first: Sequence[int], second: Sequence[int]) -> Bytes:
    """Rank by rank."""
    return tuple(a - b for a, b in zip(first, second, strict=True))


def times(count: int, each: Bytes) -> Bytes:
    """`count` of `each`."""
    return tuple(count * size for size in each)


def largest(*parts: Bytes) -> Bytes:
    """On each rank the largest of the parts, of which there is at least one."""
    return tuple(max(each) for each in zip(*parts, strict=True))


def total(parts: Sequence[Bytes], nothing: Bytes) -> Bytes:
    """On each rank all parts; `nothing`: zeros, for when there are none."""
    return tuple(map(sum, zip(*parts, strict=True))) if parts else nothing
