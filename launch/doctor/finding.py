"""One thing that the doctor found: how bad, what, where, why it matters, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from partition.errors import CheckpointError, ClusterError, ConfigError, DistInferError, StoreError

Severity = Literal["ok", "warning", "error"]
Kind = Literal["config", "checkpoint", "store", "cluster"]
ERRORS: dict[Kind, type[DistInferError]] = {
    "config": ConfigError,
    "checkpoint": CheckpointError,
    "store": StoreError,
    "cluster": ClusterError,
}
_IN_WHAT = "change what the message names"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`where`: a node, two nodes, or empty where it is of the run as a whole. `kind` says which exit code an error has.

    A problem (warning or error) has `why` and `do`.
    """

    severity: Severity
    check: str
    what: str
    where: str = ""
    why: str = ""
    do: str = ""
    kind: Kind = "cluster"

    def __post_init__(self) -> None:
        if self.is_problem and not (self.why and self.do):
            raise ValueError(f"a problem without a reason or a way out: {self.what}")

    @property
    def is_problem(self) -> bool:
        return self.severity != "ok"

    @property
    def exit_code(self) -> int:
        return ERRORS[self.kind].exit_code if self.severity == "error" else 0

    def as_error(self) -> DistInferError:
        """The error of the tree that a launch ends with."""
        return ERRORS[self.kind](f"{self.where}: {self.text}" if self.where else self.text)

    @property
    def text(self) -> str:
        """What and what to do, in one go."""
        return self.what if self.do == _IN_WHAT else f"{self.what}: {self.do}"


def ok(check: str, where: str, what: str) -> Finding:
    return Finding(severity="ok", check=check, where=where, what=what)


def warning(check: str, where: str, what: str, *, why: str, do: str) -> Finding:
    return Finding(severity="warning", check=check, where=where, what=what, why=why, do=do)


def error(check: str, where: str, what: str, *, why: str, do: str, kind: Kind = "cluster") -> Finding:
    return Finding(severity="error", check=check, where=where, what=what, why=why, do=do, kind=kind)


def refused(check: str, caught: DistInferError, *, why: str) -> Finding:
    """What another part refuses, in its own words, which say what to change."""
    kind = next(kind for kind, base in ERRORS.items() if isinstance(caught, base))
    return Finding(severity="error", check=check, what=str(caught), why=why, do=_IN_WHAT, kind=kind)


def not_run(check: str, where: str, reason: str) -> Finding:
    """A check that could not be made is no sign that all is well."""
    return warning(
        check,
        where,
        f"this check did not run: {reason}",
        why="what it would have found is not known",
        do="see to what it says, or look at this by hand",
    )
