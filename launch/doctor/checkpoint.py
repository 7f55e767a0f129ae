"""The checkpoint as each node sees it: every node with ranks packs from it, so all must see the same one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_infer.config import RunConfig
from dist_infer.startup import open_model, store_location
from launch.doctor.finding import Finding, Kind, error, ok, warning
from partition.errors import DistInferError
from partition.sizes import format_size

_CHECK: Kind = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """`content` is equal where config, headers, sizes and sampled bytes are; empty where no weights are there (yet).

    `store`: the directory of its packed store on this node. `problem`: why there is no checkpoint; else empty.
    """

    path: str
    content: str = ""
    num_files: int = 0
    num_bytes: int = 0
    store: str = ""
    problem: str = ""


def read_checkpoint(config: RunConfig) -> CheckpointFacts:
    """Headers and a few samples. A checkpoint that is missing or refused is a fact, no error."""
    try:
        model = open_model(config, weights=False)
    except DistInferError as caught:
        return CheckpointFacts(path=config.model.path, problem=str(caught))
    if model.index.kind == "config_only":
        return CheckpointFacts(path=str(model.path), problem=_no_weights(config, model.path))
    return CheckpointFacts(
        path=str(model.path),
        content=model.index.content,
        num_files=len(model.index.files),
        num_bytes=sum(file.size for file in model.index.files),
        store=store_location(config, model).directory,
    )


def judge_checkpoints(found: Mapping[str, CheckpointFacts], *, here: str, used: Collection[str]) -> list[Finding]:
    """found: by node; the others are compared with `here`. used: nodes with ranks in the plan."""
    findings = []
    for node, facts in found.items():
        if facts.problem:
            what = facts.problem
        elif facts.content and found[here].content and facts.content != found[here].content:
            what = f"{facts.path} holds another model than on {here}: config, headers, sizes or sampled weights differ"
        else:
            findings.append(ok(_CHECK, node, _words(facts)))
            continue
        do = "put the model there; model.path is a directory with config.json and safetensors, a GGUF file, or a hub id"
        if node != here:
            do = f"copy it from {here} to the same path, or keep it on a file system that all nodes mount"
        if node in used:
            why = "each node packs the weights of its ranks from its own checkpoint"
            findings.append(error(_CHECK, node, what, why=why, do=do, kind=_CHECK))
        else:
            why = "no rank is planned there now, but one may be in the next run"
            findings.append(warning(_CHECK, node, what, why=why, do=do))
    return findings


def _no_weights(config: RunConfig, path: Path) -> str:
    if Path(config.model.path).exists():
        return f"{path} has a config.json but no weights: it can be planned, not run"
    return ""  # a hub id, whose weights come when they are packed


def _words(facts: CheckpointFacts) -> str:
    if not facts.content:
        return f"{facts.path}: the weights will be fetched when they are packed"
    size = f"{facts.num_files} file{'s' if facts.num_files > 1 else ''}, {format_size(facts.num_bytes)}"
    return f"{facts.path}: {size}, content {facts.content[:12]}"
