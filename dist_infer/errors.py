"""The error tree of `partition.errors`, under the name users import."""

from partition.errors import (
    BudgetError,
    CheckpointError,
    ClusterError,
    ConfigError,
    DistInferError,
    StoreError,
    UnsupportedModelError,
    WorkerError,
)

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DistInferError",
    "StoreError",
    "UnsupportedModelError",
    "WorkerError",
]
