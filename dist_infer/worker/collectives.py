"""torch.distributed between ranks: sums within a tensor-parallel group, hidden states from stage to stage.

gloo on cpu, nccl on cuda; sums of cpu ranks of one machine in shared memory, where that is built. Every wait has the
group's timeout: a silent peer becomes an error that names it, never a hang.
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
from dist_infer.worker import shm_reduce
from dist_infer.worker.shm_reduce import Peers, SharedSums
from dist_infer.worker.stage_link import StageLink
from partition.errors import ClusterError

_Failure = (RuntimeError, dist.DistError)
_NCCL_WATCHDOG_S = 60  # at least, for a watchdog that is itself stuck in the driver


class NoGroup:
    """Tensor parallelism of one: nothing to exchange."""

    size = 1
    seconds = 0.0
    sums = ""  # by what they are made, in words

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_columns(self, tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        return tensor

    def close(self) -> None:
        """Nothing to let go of."""


class TensorGroup:
    """The tensor-parallel ranks of one stage. Implements `dist_infer.model.adapter.TensorParallel`.

    shared: what sums of this machine's ranks go by; or why there is none, and they go by the group.
    Errors are ClusterErrors with the ranks that were waited for.
    """

    def __init__(
        self, group: dist.ProcessGroup, ranks: Sequence[int], tp_rank: int, shared: SharedSums | str = ""
    ) -> None:
        self._group, self._ranks, self._tp_rank = group, tuple(ranks), tp_rank
        self._shared = None if isinstance(shared, str) else shared
        self.size = len(self._ranks)
        self.seconds = 0.0  # in collectives so far, waiting for slower peers included
        by_group = f"sums by {dist.get_backend(group)}" + (f" ({shared})" if isinstance(shared, str) and shared else "")
        self.sums = by_group if self._shared is None else "sums in shared memory"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        started = time.monotonic()
        if self._shared is not None and tensor.dtype in shm_reduce.DTYPES:
            self._shared.all_reduce(tensor)
        else:
            try:
                dist.all_reduce(tensor, group=self._group)
            except _Failure as error:
                raise self._failed("a sum", error) from error
        self.seconds += time.monotonic() - started
        return tensor

    def gather_columns(self, tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        """Columns of uneven width go to tp_rank 0, each padded to the widest, since gather wants equal shapes."""
        widest = max(widths)
        padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths] if self._tp_rank == 0 else None
        started = time.monotonic()
        try:
            dist.gather(padded, parts, dst=self._ranks[0], group=self._group)
        except _Failure as error:
            raise self._failed("a gather", error) from error
        self.seconds += time.monotonic() - started
        if parts is None:
            return tensor
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()

    def _failed(self, what: str, error: Exception) -> ClusterError:
        others = ", ".join(str(rank) for rank in range(self.size) if rank != self._tp_rank)
        return ClusterError(f"{what} with tensor rank {others} failed: {error}")


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
    except _Failure as error:
        raise ClusterError(f"no answer from rank 0 at {host}, port {port}: {error}") from error


def connect(
    *,
    store: TCPStore,
    own_host: str,
    rank: int,
    tensor: int,
    stages: int,
    device: str,
    timeout_s: float,
    steps_in_flight: int = 1,
    share_memory: bool = True,
) -> tuple[NoGroup | TensorGroup, StageLink | None]:
    """Join the world of tensor × stages ranks (rank = stage × tensor + tp_rank). All ranks call it together.

    own_host: this node's address, by which the others reach it. share_memory: for sums, where it can be.
    Raises ClusterError when others do not come in time.
    """
    # left to themselves gloo goes by the host name and nccl by the order of interfaces
    interface = interface_of(own_host)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # by this very name, not all that begin with it
    timeout = datetime.timedelta(seconds=timeout_s)
    world = tensor * stages
    backend = "nccl" if device == "cuda" else "gloo"
    if backend == "nccl":  # a collective that fails or is late ends the process, which is then replaced
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(max(_NCCL_WATCHDOG_S, timeout_s))))
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        tp_rank, stage = rank % tensor, rank // tensor
        group: NoGroup | TensorGroup = NoGroup()
        if tensor > 1:
            members = [list(range(first, first + tensor)) for first in range(0, world, tensor)]
            made = [dist.new_group(ranks, timeout=timeout) for ranks in members]  # every rank takes part in every one
            own, ranks = made[stage], members[stage]
            shared: SharedSums | str = ""
            if backend == "gloo" and share_memory:
                shared = shm_reduce.share_sums(_peers(own, ranks, tp_rank), timeout_s)
            group = TensorGroup(own, ranks, tp_rank, shared)
        link = None
        if stages > 1:
            previous = rank - tensor if stage > 0 else None
            following = rank + tensor if stage < stages - 1 else None
            default = dist.distributed_c10d._get_default_group()
            link = StageLink(default, previous, following, timeout_s=timeout_s, most_waiting=steps_in_flight)
    except _Failure as error:
        raise ClusterError(f"rank {rank} could not join the {world} ranks: {error}") from error
    return group, link


def _peers(group: dist.ProcessGroup, members: Sequence[int], tp_rank: int) -> Peers:
    def agree(yes: bool) -> bool:
        flag = torch.tensor([int(yes)])
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
        return bool(flag.item())

    def share(number: int) -> int:
        shared = torch.tensor([number])
        dist.broadcast(shared, src=members[0], group=group)
        return int(shared.item())

    return Peers(rank=tp_rank, size=len(members), agree=agree, share=share)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
