"""Ranks as processes of their own, that run a script with `join()` in it: for tests of what goes between them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from dist_infer.worker.collectives import bind_rendezvous

HOST = "127.0.0.1"
PROLOGUE = f"""
import os, signal, sys, time
import torch
from dist_infer.worker import collectives
from partition.errors import ClusterError
torch.set_num_threads(1)
port, rank, tensor, stages, timeout_s = (int(value) for value in sys.argv[1:])
store = collectives.join_rendezvous("{HOST}", port, tensor * stages, timeout_s)
def join(**options):
    return collectives.connect(
        store=store, own_host="{HOST}", rank=rank, tensor=tensor, stages=stages, device="cpu", timeout_s=timeout_s,
        **options,
    )
"""


@contextmanager
def processes(
    script: str,
    *,
    tensor: int,
    stages: int = 1,
    timeout_s: int = 20,
    only: range | None = None,
    environment: Mapping[str, str] | None = None,
    wrap: Mapping[int, Sequence[str]] | None = None,
) -> Iterator[list[subprocess.Popen[str]]]:
    """The script once for every rank (or those of `only`); what is left at the end is killed.

    wrap: the command, by rank, that runs the rank's own, which is appended.
    """
    store, port = bind_rendezvous(HOST, tensor * stages, timeout_s)
    code = PROLOGUE + textwrap.dedent(script)
    with ExitStack() as stack:
        started = []
        for rank in only if only is not None else range(tensor * stages):
            arguments = [str(value) for value in (port, rank, tensor, stages, timeout_s)]
            command = [*(wrap or {}).get(rank, ()), sys.executable, "-c", code, *arguments]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
            )
            stack.callback(process.stdout.close)
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            started.append(process)
        yield started
    del store  # the ranks needed it until now


def output(process: subprocess.Popen[str], timeout_s: float = 60) -> str:
    text, _ = process.communicate(timeout=timeout_s)
    return text.strip()
