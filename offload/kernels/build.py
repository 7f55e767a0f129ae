"""Compiles the C kernels for this machine, once: a shared library in a cache directory.

The library's name is a digest of all that decides its bytes: sources, flags, compiler, CPU and torch's OpenMP runtime.
Any number of processes may build at once; each renames its own complete file into place.

OpenMP must be torch's own runtime, since the threads of a second one would spin against those of the first. So objects
are compiled with -fopenmp, but linked with the very file that torch has loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
CACHE = Path("~/.cache/dist-infer/kernels")
_COMPILER = "cc"
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-Wno-psabi")
_DEADLINE_S = 60.0


class BuildError(Exception):
    """There is no library, and why; never shown as an error, since torch operations do the same."""


def build(cache: Path, flags: Sequence[str] = ()) -> Path:
    """The library for this machine, compiled unless it is in `cache`. `flags` come last. Raises BuildError."""
    sources = sorted(SOURCES.glob("*.c"))
    openmp = ["-fopenmp"] if platform.system() == "Linux" else []
    runtime = _openmp_runtime()
    command = [_COMPILER, *_FLAGS, *openmp, *flags, *(str(source) for source in sources)]
    if runtime is not None:
        command[command.index("-shared")] = "-c"
    version = _run([_COMPILER, "--version"], SOURCES)
    try:
        target = cache.expanduser() / f"{_digest(version, command[: -len(sources)], runtime)}.so"
    except RuntimeError as error:
        raise BuildError(f"no home directory for {cache}") from error
    try:
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as directory:
            work = Path(directory)
            made = work / target.name
            if runtime is None:
                _run([*command, "-o", str(made)], work)
            else:
                _run(command, work)
                objects = [str(work / f"{source.stem}.o") for source in sources]
                _run([_COMPILER, "-shared", *objects, str(runtime), "-o", str(made)], work)
            made.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write {target.parent}: {error.strerror or error}") from error
    return target


def _digest(version: str, command: Sequence[str], runtime: Path | None) -> str:
    """Names a library by what it is made from."""
    digest = hashlib.sha256()
    for file in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))):
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    digest.update("\n".join((version, *command, str(runtime), _cpu())).encode())
    return digest.hexdigest()[:32]


def _cpu() -> str:
    """The model and the instruction sets of this machine's CPU, as far as they can be read."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])


def _openmp_runtime() -> Path | None:
    """The libgomp that came with torch, or None where torch uses the system's."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    found += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    return found[0] if found else None


def _run(command: Sequence[str], directory: Path) -> str:
    """What a command wrote. Raises BuildError."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise BuildError(f"no C compiler: {command[0]} is not on PATH") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {_DEADLINE_S:.0f} s") from error
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror or error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
        raise BuildError(f"{command[0]} failed: {first.strip()}")
    return done.stdout
