"""`python -m dist_infer.build_ops`: compile what the extra `deepspeed` brings, once after it was installed.

async_io reads the store (`reader: deepspeed`); the shared-memory sum is for tensor-parallel ranks on CPUs of one node.
What is there already is not built again; with --check nothing is built. A run never compiles either of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from dist_infer.worker import shm_op
from offload.readers import deepspeed_ops
from partition.errors import ConfigError


def main() -> int:
    """0, or the exit code of the last one that is not there now."""
    parser = argparse.ArgumentParser(prog=shm_op.BUILD_COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="say what is there, and build nothing")
    check = parser.parse_args().check
    code = 0
    for name, load, build in (
        ("async_io", deepspeed_ops.load_op, deepspeed_ops.build_ops),
        ("the shared-memory sum", shm_op.load_op, shm_op.build_op),
    ):
        code = _build(name, load, None if check else build) or code
    return code


def _build(name: str, load: Callable[[], object], build: Callable[[], Path] | None) -> int:
    try:
        try:
            load()
        except ConfigError:
            if build is None:
                raise
            build()
            load()
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{name}: there, in {deepspeed_ops.ops_directory()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
