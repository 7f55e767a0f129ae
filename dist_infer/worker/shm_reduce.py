"""Sums over the tensor-parallel ranks of one machine in shared memory, with DeepSpeed's operator.

What the operator leaves open is closed here:
- It spins without end, and with a core, for a peer that is late, stopped or dead. So ranks meet first at a gate
  (`arrivals`), which sleeps, has a deadline and says who is missing. Whoever is within the operator then has all its
  peers there with it. For one that dies in those microseconds there is an alarm: the rank is ended at the deadline.
- It never removes its files in /dev/shm. Here they have no name any more as soon as all ranks have mapped them, and
  those of ranks that were killed in between are removed by whoever comes next.
- Its files are 66 MiB for each rank, 64 of them for messages from 1 MiB. Those are given back, and longer messages go
  in pieces.
- It waits in a loop until its peers have made their files. So all make theirs before any of them starts it.
- It leaves other types than these as they are, without an error. They go another way.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_infer.worker import arrivals
from dist_infer.worker.arrivals import Arrivals
from dist_infer.worker.shm_op import ShmOp, load_op
from partition.errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE_BYTES = 512 << 10  # below 1 MiB, from where on the operator would use the memory that is given back
_SHARED = Path("/dev/shm")
_FILE_BYTES = 8 + (2 << 20) + (64 << 20)
_KEPT_BYTES = 8 + (2 << 20)
_OURS = "dist-infer-sums"
_STALE_S = 600.0  # a file has its name for less than a second
_PUNCH_AND_KEEP_SIZE = 3
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Peers:
    """How the ranks of the group agree while they set this up: each call is one of all of them.

    agree: whether all say yes. share: the number that rank 0 has.
    """

    rank: int
    size: int
    agree: Callable[[bool], bool]
    share: Callable[[int], int]


class SharedSums:
    """One rank's part. Not thread-safe: one sum after the other, the same ones on all ranks.

    A process has one in its life, as the operator has. Owns mappings without a name, which end with the process.
    """

    def __init__(self, gate: Arrivals, timeout_s: float) -> None:
        self._gate, self._timeout_s = gate, timeout_s
        self._sum = torch.ops.deepspeed.inference_all_reduce_.default
        faulthandler.register(signal.SIGALRM, file=2, chain=True)  # where the rank was; and then its end

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """In place; contiguous, of one of DTYPES; the same bits on all ranks. ClusterError: a peer is gone or late."""
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return
        self._gate.meet()
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s)
        try:
            if size <= PIECE_BYTES:
                self._sum(tensor)
            else:
                for piece in torch.split(tensor.view(-1), PIECE_BYTES // tensor.element_size()):
                    self._sum(piece)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def close(self) -> None:
        self._gate.close()


def share_sums(peers: Peers, timeout_s: float) -> SharedSums | str:
    """What all ranks of the group have now, or the reason why none of them has it. All call this together."""
    try:
        op, reason = _usable(peers.size), ""
    except ConfigError as error:
        op, reason = None, str(error)
    if not peers.agree(op is not None) or op is None:
        return reason or "not all ranks can"
    remove_stale(time.time() - _STALE_S)
    token = peers.share(secrets.randbits(62))
    files = _Files(token, peers)
    with files.unnamed_at_the_end():
        made = files.make()
        if not peers.agree(made):
            return "no room in /dev/shm, or not the same one for all ranks"
        if not peers.agree(files.are_all_here()):
            return "the ranks do not share /dev/shm"
        with _environment(files.variables()), _alarm(timeout_s):
            op.initialize(peers.size, peers.rank)
        gate = Arrivals(files.map_gate(), peers.rank, peers.size, timeout_s)
        if not peers.agree(files.is_whole()):
            return "no room in /dev/shm"
        files.give_back()
        watched = True
        try:
            gate.watch_peers()
        except OSError:
            watched = False
        if not peers.agree(watched):
            gate.close()
            return "the ranks do not see each other's processes"
    return SharedSums(gate, timeout_s)


def remove_stale(before: float) -> None:
    """Files that ranks left which were killed while they set this up: last written before then (since 1970)."""
    with contextlib.suppress(OSError):
        for path in _SHARED.glob(f"*{_OURS}-*"):
            with contextlib.suppress(OSError):
                if path.stat().st_uid == os.getuid() and path.stat().st_mtime < before:
                    path.unlink()


def _usable(size: int) -> ShmOp:
    """Raises ConfigError with what is missing here."""
    op = load_op()
    if not arrivals.is_available():
        raise ConfigError("shared-memory sums are for Linux on x86_64 or aarch64")
    try:
        found = os.statvfs(_SHARED)
    except OSError as error:
        raise ConfigError(f"no shared memory: {error}") from error
    free, need = found.f_bavail * found.f_frsize, size * (_FILE_BYTES + _PAGE)
    if free < need:
        raise ConfigError(
            f"{_SHARED} has {free >> 20} MiB free and the shared-memory sum needs {need >> 20} MiB while it starts: "
            "enlarge it (docker: --shm-size)"
        )
    return op


class _Files:
    """The operator's file of each rank, named as it names them, and the gate's, which rank 0 makes."""

    def __init__(self, token: int, peers: Peers) -> None:
        self._peers = peers
        self._address = f"{_OURS}-{token:x}"
        names = [f"deepspeed_allreduce_buffer_{os.getuid()}_{self._address}_0_{rank}" for rank in range(peers.size)]
        self._sums = [_SHARED / name for name in names]
        self._gate = _SHARED / f"{_OURS}-{token:x}-gate"

    def variables(self) -> dict[str, str]:
        """By these the operator knows that all ranks are here, and finds its files."""
        return {"LOCAL_SIZE": str(self._peers.size), "MASTER_ADDR": self._address, "MASTER_PORT": "0"}

    def make(self) -> bool:
        own = [(self._sums[self._peers.rank], 0)]
        if self._peers.rank == 0:
            own.append((self._gate, arrivals.memory_bytes(self._peers.size)))
        try:
            for path, size in own:
                made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    if size:
                        os.posix_fallocate(made, 0, size)
                finally:
                    os.close(made)
        except OSError:
            return False
        return True

    def are_all_here(self) -> bool:
        return all(path.exists() for path in (*self._sums, self._gate))

    def is_whole(self) -> bool:
        """The operator does not say when there was no room for all of its file."""
        return self._sums[self._peers.rank].stat().st_size == _FILE_BYTES

    def map_gate(self) -> mmap.mmap:
        with open(self._gate, "r+b") as file:
            return mmap.mmap(file.fileno(), arrivals.memory_bytes(self._peers.size))

    def give_back(self) -> None:
        """The memory of the part that is for messages from 1 MiB. Where that fails, it is only more memory."""
        start = -(-_KEPT_BYTES // _PAGE) * _PAGE
        libc = ctypes.CDLL(None)
        with open(self._sums[self._peers.rank], "r+b") as file:
            length = ctypes.c_longlong(_FILE_BYTES - start)
            libc.fallocate(file.fileno(), _PUNCH_AND_KEEP_SIZE, ctypes.c_longlong(start), length)

    @contextlib.contextmanager
    def unnamed_at_the_end(self) -> Iterator[None]:
        """Each removes its own; the agreements within have seen to it that nobody needs the name any more."""
        try:
            yield
        finally:
            self._sums[self._peers.rank].unlink(missing_ok=True)
            if self._peers.rank == 0:
                self._gate.unlink(missing_ok=True)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _alarm(timeout_s: float) -> Iterator[None]:
    """The end of this process, if what is within does not come to its own."""
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
