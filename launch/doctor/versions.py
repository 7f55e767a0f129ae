"""Versions of what computes, equal on all nodes; the four packages, from one place. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import dist_infer
from launch.doctor.finding import Finding, error, ok, warning
from launch.root_guard import PACKAGES, find_intruder

_CHECK = "versions"
_FROM_METADATA = ("torch", "transformers", "ray")
_MISSING = "not installed"


@dataclass(frozen=True, kw_only=True)
class VersionFacts:
    """What one process would import. `intruder`: in words, if one of the four packages is not ours; else empty."""

    versions: dict[str, str]
    root: str
    intruder: str


def read_versions() -> VersionFacts:
    """Of this process. `dist-infer` is the version and, since it may be a working copy, a digest of the sources."""
    root = Path(dist_infer.__file__).resolve().parent.parent
    found = {"Python": platform.python_version()}
    for name in _FROM_METADATA:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = _MISSING
    found["dist-infer"] = f"{dist_infer.__version__} (sources {_digest(root)})"
    return VersionFacts(versions=found, root=str(root), intruder=find_intruder() or "")


def judge_versions(found: Mapping[str, VersionFacts], *, here: str, needs_ray: bool) -> list[Finding]:
    """found: by node. `here` is the one whose versions the others are compared with."""
    findings = []
    for node, facts in found.items():
        if facts.intruder:
            findings.append(_foreign(node, facts.intruder))
        for name in ("torch", "transformers", *(["ray"] if needs_ray else [])):
            if facts.versions[name] == _MISSING:
                findings.append(_missing(node, name))
    for name in found[here].versions:
        if name == "ray" and not needs_ray:
            continue
        for node, facts in found.items():
            other, own = facts.versions.get(name, _MISSING), found[here].versions[name]
            if other != own and _MISSING not in (other, own):
                findings.append(_differs(name, node, other, here, own))
    if not findings:
        words = ", ".join(f"{name} {version}" for name, version in found[here].versions.items() if version != _MISSING)
        everywhere = ", the same everywhere" if len(found) > 1 else ""
        findings.append(ok(_CHECK, here if len(found) == 1 else "", words + everywhere))
    return findings


def _differs(name: str, node: str, other: str, here: str, own: str) -> Finding:
    what = f"{name} is {other} there and {own} on {here}"
    if _public(other) == _public(own) and name == "torch":
        return warning(
            _CHECK,
            node,
            what,
            why="the same version built for other hardware rounds differently: answers may depend on the node",
            do="where answers must be equal, install the same build on all nodes",
        )
    return error(
        _CHECK,
        node,
        what,
        why="ranks of two versions may refuse each other's messages, or compute something else without a word",
        do=f"install the same {name} on all nodes, e.g. with `pip install -c constraints.txt`, and restart Ray there",
    )


def _foreign(node: str, words: str) -> Finding:
    return error(
        _CHECK,
        node,
        words,
        why="ranks there would run somebody else's code, or none",
        do="rename the other package, or start Ray there from another directory and without PYTHONPATH",
        kind="config",
    )


def _missing(node: str, name: str) -> Finding:
    return error(
        _CHECK,
        node,
        f"{name} is not installed",
        why="no rank can start there",
        do="install dist-infer there, as on the other nodes: `pip install 'dist-infer[ray]'`",
    )


def _public(version: str) -> str:
    """Without the build: 2.9.0 of 2.9.0+cu126."""
    return version.partition("+")[0]


def _digest(root: Path) -> str:
    """Of the sources and tables of the four packages, by their paths. Milliseconds."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
