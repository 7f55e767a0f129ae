"""Marks in store directories, by which nodes find out whether they share one.

A mark is named like an unfinished file, so the next packer of that directory removes what a killed run has left.
"""

from __future__ import annotations

from pathlib import Path

from offload.format import TMP_SUFFIX
from partition.errors import StoreError


def leave_mark(directory: Path, name: str) -> None:
    """Make the directory and the mark in it. Raises StoreError when that cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}{TMP_SUFFIX}").touch()
    except OSError as error:
        raise StoreError(f"{directory} cannot be written: {error}. Set offload.store to a local disk") from error


def sees_mark(directory: Path, name: str) -> bool:
    """Whether that mark is in the directory as this node sees it."""
    return (directory / f"{name}{TMP_SUFFIX}").exists()
