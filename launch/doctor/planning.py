"""The plan for what the nodes have, and what it would be worth with the rates that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_infer.backend import make_backend
from dist_infer.config import RunConfig
from dist_infer.startup import Model, plan_run
from launch.doctor.finding import Finding, not_run, refused
from launch.doctor.network import LinkFacts, slowest
from launch.doctor.running import Running
from partition.errors import BudgetError, DistInferError
from partition.hardware import HardwareFacts, NodeFacts
from partition.plan import Plan

_PLAN_S = 3.0
_NOTABLE_SHARE = 0.95  # of the predicted tokens per second; what costs less is no problem


@dataclass(frozen=True, kw_only=True)
class Planned:
    """No plan: a finding says why, or that was said elsewhere. `used`: labels of the nodes with ranks; all without one.

    The effects are words on what is predicted with the measured disks, or the measured network, alone; empty where that
    makes no difference.
    """

    plan: Plan | None
    used: frozenset[str]
    disk_effect: str = ""
    network_effect: str = ""
    findings: tuple[Finding, ...] = ()


def plan_for(
    config: RunConfig,
    model: Model,
    nodes: Sequence[NodeFacts],
    disks: Sequence[float | None],
    links: Sequence[LinkFacts],
) -> Planned:
    """nodes: facts by their labels, with assumed rates; disks: bytes per second of each, where it was measured."""
    backend = make_backend(config.cluster, config.name)
    footprint = backend.footprint(config.parallel.tensor, config.parallel.pipeline)
    backend.close()

    def work() -> Planned:
        assumed = HardwareFacts(nodes=tuple(nodes))
        plan = plan_run(config, model, assumed, footprint)
        used = frozenset(nodes[rank.node].name for rank in plan.ranks)
        measured = tuple(
            node if rate is None else replace(node, disk_bytes_per_s=rate)
            for node, rate in zip(nodes, disks, strict=True)
        )
        network_effect, network = "", slowest(links, used)
        if network is not None:
            slow = replace(assumed, network_bytes_per_s=min(network, assumed.network_bytes_per_s))
            network_effect = _effect(plan, plan_run(config, model, slow, footprint))
        disk_effect = _effect(plan, plan_run(config, model, HardwareFacts(nodes=measured), footprint))
        return Planned(plan=plan, used=used, disk_effect=disk_effect, network_effect=network_effect)

    try:
        return Running(work, limit_s=_PLAN_S, name="plan").result()
    except BudgetError as caught:
        finding = refused("memory", caught, why="ranks that take more than there is are ended by the kernel")
    except DistInferError as caught:
        finding = refused("plan", caught, why="what cannot be planned cannot be started")
    except Exception as caught:  # the other findings stand
        finding = not_run("plan", "", f"{type(caught).__name__}: {caught}")
    return Planned(plan=None, used=frozenset(node.name for node in nodes), findings=(finding,))


def _effect(assumed: Plan, measured: Plan) -> str:
    before, now = assumed.prediction.decode_tokens_per_s, measured.prediction.decode_tokens_per_s
    if now >= _NOTABLE_SHARE * before:
        return ""
    return f": predicted are {now:.1f} output tok/s, not {before:.1f}"
