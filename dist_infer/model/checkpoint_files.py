"""pread on a checkpoint's files; never mmap, so that a file that changes ends in an error and not in SIGBUS."""

from __future__ import annotations

import os

from partition.checkpoint_index import CheckpointIndex, TensorEntry
from partition.errors import CheckpointError

_MOST_BYTES = 64 << 20  # of one call: the kernel reads at most 2 GiB


class CheckpointFiles:
    """Reads tensors as they are stored. A descriptor lives for one call. Safe to use from several threads."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._root = index.directory

    def where(self, entry: TensorEntry) -> str:
        """The file that holds a tensor, for people."""
        return str(self._root / entry.file)

    def bytes_of(self, entry: TensorEntry) -> bytearray:
        """All bytes of the tensor. Raises CheckpointError naming tensor and file."""
        path = self._root / entry.file
        buffer = bytearray(entry.end - entry.start)
        view, done = memoryview(buffer), 0
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < len(buffer):
                    count = os.preadv(descriptor, [view[done : done + _MOST_BYTES]], entry.start + done)
                    if count == 0:
                        raise CheckpointError(
                            f"{path} ended inside tensor {entry.name}: {len(buffer)} bytes expected, {done} there; "
                            "the file changed or is truncated"
                        )
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {entry.name} from {path}: {error}") from error
        return buffer
