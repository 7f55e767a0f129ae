"""DeepSpeed's compiled sum over the processes of one machine (shm_comm): built once, loaded without DeepSpeed.

`python -m dist_infer.build_ops` compiles it where DeepSpeed is installed; a rank never does. It lies beside async_io,
see `offload.readers.deepspeed_ops`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol, cast

from offload.readers.deepspeed_ops import compile_op, load_module, ops_directory
from partition.errors import ConfigError

BUILD_COMMAND = "python -m dist_infer.build_ops"
_NAME = "deepspeed_shm_comm"
_ALL_KERNELS = 2  # what vector_kernel_level() says of AVX-512BW, for which every function of it is compiled
_LOCK = threading.Lock()


class ShmOp(Protocol):
    """The compiled module; loading it makes the operator torch.ops.deepspeed.inference_all_reduce_."""

    def initialize(self, size: int, rank: int, /) -> None: ...

    def vector_kernel_level(self) -> int: ...


def load_op() -> ShmOp:
    """Raises ConfigError: it is not built, or does not fit this machine."""
    import torch  # noqa: F401  (its libraries have to be there first)

    path = _path()
    if not path.exists():
        raise ConfigError(f"the shared-memory sum is not built: run `{BUILD_COMMAND}`")
    with _LOCK:
        try:
            op = cast(ShmOp, load_module(_NAME, path))
        except (OSError, ImportError) as error:
            raise ConfigError(f"{path} cannot be loaded ({error}): run `{BUILD_COMMAND}`") from error
    if op.vector_kernel_level() < _ALL_KERNELS:
        raise ConfigError("the shared-memory sum needs a processor with AVX-512BW")
    return op


def build_op() -> Path:
    """Compile it, about a minute; the file. Raises ConfigError; the compiler's words are on stderr."""

    def compile_it() -> None:
        from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

        class OneThread(ShareMemCommBuilder):  # type: ignore[misc]
            """Without OpenMP: a small sum is over before a second thread has woken, and the pool would be another."""

            def cxx_args(self) -> list[str]:
                return ["-O2"]

        OneThread().load(verbose=False)

    compile_op("the shared-memory sum", compile_it, "g++ and ninja (apt-get install g++)")
    return _path()


def _path() -> Path:
    return ops_directory() / _NAME / f"{_NAME}.so"
