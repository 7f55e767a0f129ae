"""torch.distributed between ranks: sums within a tensor-parallel group, hidden states from stage to stage.

gloo on cpu, nccl on cuda. Every wait has the group's timeout: a silent peer becomes an error, never a hang.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from dist_infer.interface import interface_of
from partition.errors import ClusterError


class NoGroup:
    """Tensor parallelism of one: nothing to exchange."""

    size = 1
    seconds = 0.0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_columns(self, tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        return tensor


class TensorGroup:
    """The tensor-parallel ranks of one stage. Implements `dist_infer.model.adapter.TensorParallel`."""

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], tp_rank: int) -> None:
        self._group, self._ranks, self._tp_rank = group, tuple(ranks), tp_rank
        self.size = len(self._ranks)
        self.seconds = 0.0  # in collectives so far, waiting for slower peers included

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        started = time.monotonic()
        dist.all_reduce(tensor, group=self._group)
        self.seconds += time.monotonic() - started
        return tensor

    def gather_columns(self, tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        """Columns of uneven width go to tp_rank 0, each padded to the widest, since gather wants equal shapes."""
        widest = max(widths)
        padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths] if self._tp_rank == 0 else None
        started = time.monotonic()
        dist.gather(padded, parts, dst=self._ranks[0], group=self._group)
        self.seconds += time.monotonic() - started
        if parts is None:
            return tensor
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)


class StageLink:
    """Hidden states to the same tp_rank of the next stage. Sending does not block the sender's compute."""

    def __init__(self, group: dist.ProcessGroup, previous: int | None, following: int | None) -> None:
        self._group, self._previous, self._following = group, previous, following
        self._sending: tuple[dist.Work, torch.Tensor] | None = None

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self._previous is None:
            raise RuntimeError("the first stage receives nothing")
        hidden = torch.empty(tuple(shape), dtype=dtype, device=device)
        dist.recv(hidden, src=self._previous, group=self._group)
        return hidden

    def send(self, hidden: torch.Tensor) -> None:
        if self._following is None:
            raise RuntimeError("the last stage sends nothing")
        self.flush()
        hidden = hidden.contiguous()
        work = dist.isend(hidden, dst=self._following, group=self._group)
        if work is not None:
            self._sending = (work, hidden)  # the buffer must live until it is sent

    def flush(self) -> None:
        if self._sending is not None:
            self._sending[0].wait()
            self._sending = None


def bind_rendezvous(host: str, world_size: int, timeout_s: float) -> tuple[TCPStore, int]:
    """Rank 0 binds a free port on `host` and publishes it; the returned store must stay alive.

    The socket is ours: left to itself the store would listen on every interface.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(world_size * 2)
    port = int(listener.getsockname()[1])
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # the store closes it
    )
    return store, port


def join_rendezvous(host: str, port: int, world_size: int, timeout_s: float) -> TCPStore:
    """Raises ClusterError when nobody answers there in time."""
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        return TCPStore(host, port, world_size, is_master=False, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, dist.DistError) as error:
        raise ClusterError(f"no answer from rank 0 at {host}, port {port}: {error}") from error


def connect(
    *, store: TCPStore, own_host: str, rank: int, tensor: int, stages: int, device: str, timeout_s: float
) -> tuple[NoGroup | TensorGroup, StageLink | None]:
    """Join the world of tensor × stages ranks (rank = stage × tensor + tp_rank). All ranks call it together.

    own_host: this node's address, by which the others reach it. Raises ClusterError when others do not come in time.
    """
    # left to themselves gloo goes by the host name and nccl by the order of interfaces
    interface = interface_of(own_host)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # by this very name, not all that begin with it
    timeout = datetime.timedelta(seconds=timeout_s)
    world = tensor * stages
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        tp_rank, stage = rank % tensor, rank // tensor
        group: NoGroup | TensorGroup = NoGroup()
        for index in range(stages):  # every rank must take part in making every group
            members = list(range(index * tensor, (index + 1) * tensor))
            made = dist.new_group(members, timeout=timeout) if tensor > 1 else None
            if index == stage and made is not None:
                group = TensorGroup(made, members, tp_rank)
        link = None
        if stages > 1:
            previous = rank - tensor if stage > 0 else None
            following = rank + tensor if stage < stages - 1 else None
            link = StageLink(dist.distributed_c10d._get_default_group(), previous, following)
    except (RuntimeError, dist.DistError) as error:
        raise ClusterError(f"rank {rank} could not join the {world} ranks: {error}") from error
    return group, link


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
