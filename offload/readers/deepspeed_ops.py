"""DeepSpeed's compiled async_io operator: built once when it is installed, loaded without `import deepspeed`.

    pip install 'dist-infer[deepspeed]'        needs g++ and libaio-dev
    python -m offload.readers.deepspeed        compiles, for minutes; a run never does

It lies below the environment (or in TORCH_EXTENSIONS_DIR), in a directory of its own for each torch and Python.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import importlib.util
import os
import platform
import sys
import sysconfig
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from partition.errors import ConfigError

BUILD_COMMAND = "python -m offload.readers.deepspeed"
_NAMES = ("pin_memory", "async_io")  # the second one finds symbols of the first
_LOCK = threading.Lock()


class TensorLike(Protocol):
    """The one thing asked of a torch tensor here."""

    def data_ptr(self) -> int: ...


class AioHandle(Protocol):
    """A handle of async_io: its reads are blocking ones here, so that nothing is pending between two calls."""

    def pread(self, buffer: object, filename: str, validate: bool, asynchronous: bool, offset: int, /) -> int: ...

    def is_pinned(self, buffer: object, /) -> bool: ...

    def new_cpu_locked_tensor(self, num_elem: int, example: object, /) -> TensorLike: ...

    def free_cpu_locked_tensor(self, tensor: object, /) -> bool: ...


class AioOp(Protocol):
    """The compiled module."""

    def aio_handle(
        self, block_size: int, queue_depth: int, single_submit: bool, overlap_events: bool, intra_op: int, /
    ) -> AioHandle: ...


def ops_directory() -> Path:
    """Where the operator for this torch and this Python lies, built or not."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    parent = Path(root) if root else Path(sys.prefix) / "share" / "dist-infer" / "torch_extensions"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return parent / f"deepspeed-torch-{version('torch')}-{python}-{platform.machine()}"


def load_op() -> AioOp:
    """The operator; loaded once per process.

    Raises:
        ConfigError: it is not built, or does not fit this machine.
    """
    import torch  # noqa: F401  (its libraries have to be there first)

    with _LOCK:
        modules = []
        for name in _NAMES:
            path = ops_directory() / name / f"{name}.so"
            if not path.exists():
                raise ConfigError(
                    f"reader deepspeed is not built: {path} is missing. Run `{BUILD_COMMAND}` once in this environment "
                    "(it compiles for minutes and needs the extra dist-infer[deepspeed], g++ and libaio-dev), "
                    "or use `reader: threads`"
                )
            try:
                modules.append(load_module(name, path))
            except (OSError, ImportError) as error:
                raise ConfigError(
                    f"reader deepspeed cannot be loaded: {error}. Install libaio and build it again "
                    f"(`{BUILD_COMMAND}`), or use `reader: threads`"
                ) from error
        return cast(AioOp, modules[-1])


def build_ops() -> Path:
    """Compile the operator with DeepSpeed's own builder; the directory it lies in then.

    Raises:
        ConfigError: DeepSpeed, a compiler or libaio is missing; the compiler's words are on stderr.
    """

    def compile_it() -> None:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        AsyncIOBuilder().load(verbose=False)

    return compile_op("async_io", compile_it, "g++, ninja and libaio (apt-get install g++ libaio-dev)")


def compile_op(name: str, compile_it: Callable[[], None], needs: str) -> Path:
    """Run one of DeepSpeed's builders so that what it makes lies in `ops_directory`, which is returned.

    name, needs: for the error, a ConfigError.
    """
    directory = ops_directory()
    scripts = sysconfig.get_path("scripts")  # where pip put ninja
    kept = dict(os.environ)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
    os.environ["PATH"] = os.pathsep.join((scripts, os.environ.get("PATH", "")))
    try:
        importlib.import_module("deepspeed.ops.op_builder")  # without it nothing is left behind
        directory.mkdir(parents=True, exist_ok=True)
        compile_it()
    except ModuleNotFoundError as error:
        raise ConfigError(f"DeepSpeed is not installed ({error}): pip install 'dist-infer[deepspeed]'") from error
    except (RuntimeError, OSError, ImportError) as error:
        raise ConfigError(f"building {name} failed: {error}. It needs {needs}") from error
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return directory


def load_module(name: str, path: Path) -> ModuleType:
    """Load one compiled module under the name it was built with, its symbols visible to the next one."""
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
