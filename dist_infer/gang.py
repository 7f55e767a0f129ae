"""The ranks of a run: planned, packed, started, and replaced by others when they are lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_infer.backend import Backend, OnStep, RankSpec, make_backend
from dist_infer.config import RunConfig
from dist_infer.engine.executor import Executor
from dist_infer.engine.scheduler import SchedulerConfig
from dist_infer.gang_state import Packing, Placing
from dist_infer.messages import WorkerReport
from dist_infer.node_store import NodeStore, PackOrder, sum_reports, units_by_node
from dist_infer.openmp import release_pool
from dist_infer.startup import open_model, pack_units, plan_run
from partition.errors import ClusterError
from partition.hardware import HardwareFacts
from partition.plan import Plan
from partition.sizes import format_size

if TYPE_CHECKING:  # it imports torch, which a plan does not need
    from offload.pack import PackReport


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a gang of ranks is started from: facts of the nodes, the plan for them, and its packed stores."""

    facts: HardwareFacts
    plan: Plan
    pack_report: PackReport
    step_timeout_s: float
    spec: RankSpec


class Gang:
    """The ranks of one plan: planned and packed by the constructor, running after `start`.

    Owns backend and executor; `close` ends both. `replace` puts other ranks in the place of those that were lost.
    timeline: the ranks record what `executor.timelines` gives. apart: none of them is in this process.
    """

    def __init__(self, config: RunConfig, on_step: OnStep, *, timeline: bool = False, apart: bool = False) -> None:
        self._config, self._on_step, self._timeline = config, on_step, timeline
        self._starting = threading.Lock()  # guards the two below
        self._executors: list[Executor] = []  # that are not closed
        self._is_stopped = False
        with ExitStack() as stack:
            self.model = open_model(config)
            self._backend: Backend = make_backend(config.cluster, config.name, apart=apart)
            stack.callback(self._backend.close)
            self._prepared = self._prepare()
            self.executor = self._make_executor(self._prepared.spec)
            stack.callback(self.stop)
            self._stack = stack.pop_all()
        self.reports: tuple[WorkerReport, ...] = ()

    def start(self) -> None:
        """Bring the ranks up and load them. The caller closes the gang when this raises."""
        self._on_step(Placing())
        self.reports = self.executor.start()

    def replace(self, epoch: int) -> str:
        """End what is left of the ranks and start others, as the gang of that epoch, on the nodes that are there.

        They are planned anew where nodes are gone. Returns what that costs, in words; empty: nothing. Raises
        ClusterError when the new ones are lost too, and what planning and packing raise; then it may be called again.
        """
        self.executor.close()
        prepared, cost = self._prepared, ""
        ended: dict[int, list[int]] = {}
        for report in self.reports:
            ended.setdefault(prepared.plan.ranks[report.rank].node, []).append(report.pid)
        if lost := self._backend.drop_lost_nodes(prepared.plan, ended):
            prepared = self._prepare()
            cost = _cost(lost, self._prepared.plan, prepared.plan)
        prepared = replace(prepared, spec=replace(prepared.spec, epoch=epoch))
        executor = self._make_executor(prepared.spec)
        self._on_step(Placing())
        try:
            reports = executor.start()
        except BaseException:
            executor.close()
            raise
        self._prepared, self.executor, self.reports = prepared, executor, reports
        return cost

    def stop(self) -> None:
        """End the ranks, those too that are being started; there are none after that. Any thread; idempotent."""
        with self._starting:
            self._is_stopped = True
            executors, self._executors = self._executors, []
        for executor in executors:
            executor.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def facts(self) -> HardwareFacts:
        return self._prepared.facts

    @property
    def plan(self) -> Plan:
        return self._prepared.plan

    @property
    def pack_report(self) -> PackReport:
        return self._prepared.pack_report

    @property
    def step_timeout_s(self) -> float:
        return self._prepared.step_timeout_s

    @property
    def computes_here(self) -> bool:
        """Whether the ranks live in this process."""
        return self._backend.computes_here(self.plan)

    @property
    def num_kv_blocks(self) -> int:
        return min(report.num_kv_blocks for report in self.reports)

    @property
    def scheduler_config(self) -> SchedulerConfig:
        """What the ranks have for requests, once they have started."""
        plan = self.plan
        return SchedulerConfig(
            num_kv_blocks=self.num_kv_blocks,
            block_tokens=plan.block_tokens,
            max_batch_tokens=plan.max_batch_tokens,
            max_micro_batches=plan.max_micro_batches,
            max_requests=plan.max_requests,
            max_model_len=plan.max_model_len,
            max_steps_in_flight=plan.max_steps_in_flight,
            shares_prompts=plan.model.path == "packed",
            has_rings=any(plan.ring_rows),
        )

    def _prepare(self) -> Prepared:
        """Plan for the nodes that are there, and pack what that needs."""
        config = self._config
        footprint = self._backend.footprint(config.parallel.tensor, config.parallel.pipeline)
        with_devices = config.cluster.device != "cpu"
        # A misfit must end before anything is packed or started, so plan with assumed rates first.
        facts = self._backend.facts(with_devices=with_devices, sample=None, dtype=None)
        rough = plan_run(config, self.model, facts, footprint)
        stores = self._pack(rough)
        streams = any(rank.bytes_in("nvme") for rank in rough.ranks)
        facts = self._backend.facts(
            with_devices=with_devices,
            sample={node: Path(store.sample) for node, store in stores.items()},
            dtype=self.model.dtype,
            # what is read once need not be read by the best reader
            reader="threads" if config.offload.reader == "auto" and not streams else config.offload.reader,
        )
        release_pool()  # this thread has packed and measured; another one of this process may compute
        plan = plan_run(config, self.model, facts, footprint)
        if units_by_node(plan) != units_by_node(rough):  # measured rates have moved a unit to another node
            stores = self._pack(plan, stores)
        step_timeout_s = _step_timeout(config, plan)
        spec = RankSpec(
            plan=plan,
            config_json=json.dumps(dict(self.model.index.config)),
            stores={node: store.location for node, store in stores.items()},
            verify=config.offload.verify,
            readers=tuple(node.reader for node in facts.nodes),
            step_timeout_s=step_timeout_s,
            timeline=self._timeline,
        )
        return Prepared(
            facts=facts,
            plan=plan,
            pack_report=sum_reports(stores.values()),
            step_timeout_s=step_timeout_s,
            spec=spec,
        )

    def _pack(self, plan: Plan, before: Mapping[int, NodeStore] | None = None) -> dict[int, NodeStore]:
        """Each node packs what its ranks of this plan own. before: what was packed for another plan, for the report."""

        def here(names: Sequence[str]) -> NodeStore:
            return pack_units(self._config, self.model, names, lambda it: forward(it.done, it.total, it.detail))

        def forward(done: int, total: int, detail: str) -> None:
            self._on_step(Packing(done=done, total=total, detail=detail))

        order = PackOrder(
            config_json=self._config.model_dump_json(), content=self.model.index.content, units=units_by_node(plan)
        )
        found = self._backend.pack(order, here, forward)
        return {node: store.after((before or {}).get(node)) for node, store in found.items()}

    def _make_executor(self, spec: RankSpec) -> Executor:
        executor = self._backend.executor(spec, self._on_step)
        with self._starting:
            if self._is_stopped:
                raise ClusterError("the ranks are being ended, so no others are started")
            self._executors = [executor]
        return executor


def _cost(lost: Sequence[str], before: Plan, after: Plan) -> str:
    """What a plan for fewer nodes gives away, in words."""

    def of(plan: Plan) -> str:
        streamed = sum(rank.streamed_bytes_per_pass for rank in plan.ranks)
        return (
            f"{plan.prediction.decode_tokens_per_s:.1f} output tok/s predicted, {format_size(streamed)} streamed per "
            f"pass, KV {plan.num_kv_blocks} blocks, {plan.max_requests} requests of {plan.max_model_len} tokens"
        )

    return f"without {', '.join(lost)}: {of(after)}; before: {of(before)}"


def _step_timeout(config: RunConfig, plan: Plan) -> float:
    if config.engine.step_timeout != "auto":
        return float(config.engine.step_timeout)
    return max(30.0, 10.0 * plan.prediction.seconds_per_pass * plan.max_micro_batches)
