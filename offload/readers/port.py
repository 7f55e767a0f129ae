"""The port of readers: a range of a file into given memory, and a future per range."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from partition.errors import StoreError


@dataclass(frozen=True)
class ReadFile:
    """A file to read from. Readers open it once and keep the descriptor: a file replaced later is not mixed in."""

    path: Path


class Reader(Protocol):
    """Reads ranges in the order of submission; many may be in flight. Owns its descriptors and threads.

    Belongs to whoever made it. `submit` is called from one thread; futures are completed on any thread.
    """

    @property
    def name(self) -> str:
        """For reports, e.g. "threads"."""
        ...

    @property
    def direct(self) -> bool:
        """True as long as every byte came past the page cache."""
        ...

    @property
    def num_retries(self) -> int:
        """Reads repeated after an error so far."""
        ...

    def submit(
        self,
        file: ReadFile,
        offset: int,
        length: int,
        into: memoryview,
        before: Callable[[], None] | None = None,
    ) -> Future[int]:
        """Read bytes [offset, offset + length) of `file` into the first `length` bytes of `into`.

        offset, length and the address of `into` are multiples of 4096. The future's result is the number of bytes read,
        which the waiter compares with `length`; its exception is a StoreError naming file, offset, expected and got.
        Waiting, with a deadline, is the caller's. `into` belongs to the reader until the future is done; a future that
        could be cancelled was not begun and leaves `into` alone.
        `before` is called exactly once, on any thread, before the first byte is written to `into` (a buffer that is
        still being copied from is waited for here, so that the submitting thread need not); what it raises ends up in
        the future.
        """
        ...

    def close(self) -> None:
        """Stop; reads not begun are cancelled, running ones finish first (with a deadline). Idempotent."""
        ...


def read_failed(file: ReadFile, offset: int, expected: int, got: int, reason: str) -> StoreError:
    """The error of a range that could not be read completely."""
    return StoreError(
        f"reading {file.path} failed at byte {offset + got}: {reason} "
        f"(wanted {expected} bytes from {offset}, got {got}). "
        "Check the disk and the file (`dist-infer verify`); delete the file to have it packed again"
    )
