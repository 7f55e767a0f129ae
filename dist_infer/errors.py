"""The error tree of `partition.errors`, under the name users import."""

from partition.errors import (
    BudgetError,
    CheckpointError,
    ClusterError,
    ClusterGoneError,
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
    "ClusterGoneError",
    "ConfigError",
    "DistInferError",
    "StoreError",
    "UnsupportedModelError",
    "WorkerError",
]
