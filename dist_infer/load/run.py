"""The load itself: starts requests when they are due and waits for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx2

from dist_infer.load.arrivals import Load, poisson_times
from dist_infer.load.client import Target, send
from dist_infer.load.prompts import Question
from dist_infer.load.record import Record
from partition.errors import ClusterError


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Records in the order in which they were due. seconds: from the start to the last end."""

    records: list[Record]
    seconds: float


async def warm_up(client: httpx2.AsyncClient, target: Target, prompts: Iterator[Question], num_requests: int) -> None:
    """Requests that are not counted, at once. Raises ClusterError when none of them is answered."""
    records = [Record(due_s=0.0) for _ in range(num_requests)]
    async with asyncio.TaskGroup() as tasks:
        for record in records:
            tasks.create_task(send(client, target, next(prompts), record, time.monotonic))
    if records and all(record.error for record in records):
        error, detail = records[0].error, records[0].detail
        raise ClusterError(f"{target.path} answers nothing: {error}{': ' if detail else ''}{detail[:400]}")


async def run_load(
    client: httpx2.AsyncClient,
    target: Target,
    load: Load,
    prompts: Iterator[Question],
    *,
    seed: int = 0,
    on_end: Callable[[int], None] = lambda num_ended: None,
) -> Measured:
    """on_end: called after each request with how many have ended. Cancellation closes what is open, then is raised."""
    run = _Run(client, target, load, prompts, on_end)
    async with asyncio.TaskGroup() as tasks:
        if load.rate_per_s is not None:
            await run.open_loop(tasks, poisson_times(load.rate_per_s, seed))
        else:
            for _ in range(load.concurrency or 0):
                tasks.create_task(run.closed_loop())
    ends = [record.end_s for record in run.records]
    return Measured(records=run.records, seconds=max(ends, default=0.0))


class _Run:
    def __init__(
        self,
        client: httpx2.AsyncClient,
        target: Target,
        load: Load,
        prompts: Iterator[Question],
        on_end: Callable[[int], None],
    ) -> None:
        self.records: list[Record] = []
        self._client = client
        self._target = target
        self._load = load
        self._prompts = prompts
        self._on_end = on_end
        self._num_ended = 0
        self._start = time.perf_counter()

    async def open_loop(self, tasks: asyncio.TaskGroup, due: Iterator[float]) -> None:
        """A request is sent when it is due, however many are still open."""
        for due_s in due:
            if not self._may_begin(due_s):
                return
            await asyncio.sleep(max(0.0, due_s - self._now()))
            record = Record(due_s=due_s)
            self.records.append(record)
            tasks.create_task(self._ask(record))

    async def closed_loop(self) -> None:
        """One after the other."""
        while self._may_begin(self._now()):
            record = Record(due_s=self._now())
            self.records.append(record)
            await self._ask(record)

    async def _ask(self, record: Record) -> None:
        await send(self._client, self._target, next(self._prompts), record, self._now)
        self._num_ended += 1
        self._on_end(self._num_ended)

    def _may_begin(self, at_s: float) -> bool:
        load = self._load
        is_full = load.max_requests is not None and len(self.records) >= load.max_requests
        return not is_full and (load.duration_s is None or at_s < load.duration_s)

    def _now(self) -> float:
        return time.perf_counter() - self._start
