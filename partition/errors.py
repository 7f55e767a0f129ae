"""The error tree. Every message says what was asked, what is there and what to change.

    DistInferError                 exit code
    ├── ConfigError          2     the run file, a flag or a prompt is wrong (also a ValueError)
    │   └── BudgetError      2     a memory budget cannot hold the plan
    ├── CheckpointError      3     the model files are missing, damaged, unsafe or not what config.json says
    │   └── UnsupportedModelError  3  the family or layout cannot be run correctly
    ├── StoreError           3     the packed store is stale, damaged, of another layout, or the disk failed
    └── ClusterError         4     workers, Ray or the network failed
        ├── WorkerError      4     one rank raised or died; carries the rank
        └── ClusterGoneError 4     the cluster itself is gone: nothing can be started in it again

Interruption by the user ends with exit code 130 and is no error of this tree.
"""

from __future__ import annotations


class DistInferError(Exception):
    """Base of all errors meant for people; `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(DistInferError, ValueError):
    """What the user wrote cannot be run."""

    exit_code = 2


class BudgetError(ConfigError):
    """A memory budget cannot hold the plan: the message has need, have and the option to turn."""


class CheckpointError(DistInferError):
    """The source checkpoint cannot be used."""

    exit_code = 3


class UnsupportedModelError(CheckpointError):
    """The model family, or this use of it, would not be computed correctly, so it is refused by name."""


class StoreError(DistInferError):
    """The packed store cannot be used, or reading it failed."""

    exit_code = 3


class ClusterError(DistInferError):
    """Workers could not be started, or were lost."""

    exit_code = 4


class WorkerError(ClusterError):
    """One rank raised or died. The message holds the rank's own error."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class ClusterGoneError(ClusterError):
    """What ranks are started in is gone, so that no others can take their place."""
