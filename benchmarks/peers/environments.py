"""One Python environment a peer, made once below the work directory: a stamp in it says what it was made from.

work/environments/NAME/          the venv, with `.complete` holding the hash of its recipe
work/libaio/                     libaio's header and library where libaio-dev is missing (unpacked, not installed)
work/torch_extensions/           DeepSpeed's operators, compiled once
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"  # a local CPU wheel is taken where pip is configured with one
TRANSFORMERS = "transformers==5.23.0"
_STAMP = ".complete"
_BUILD_TIMEOUT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is installed: `steps` of pip arguments in turn, each with `variables` set; `after` builds what is left."""

    name: str
    steps: tuple[tuple[str, ...], ...]
    variables: Mapping[str, str]
    after: str = ""


def recipes() -> dict[str, Recipe]:
    """By name. Versions are pinned so that a table can be repeated."""
    return {
        recipe.name: recipe
        for recipe in (
            Recipe(
                name="accelerate",
                steps=((TORCH, "numpy"), (TRANSFORMERS, "accelerate==1.15.0", "safetensors==0.8.0")),
                variables={},
            ),
            Recipe(
                name="deepspeed",
                steps=(
                    (TORCH, "numpy", "setuptools", "wheel", "ninja"),
                    (TRANSFORMERS, "accelerate==1.15.0", "safetensors==0.8.0"),
                    ("--no-build-isolation", "deepspeed==0.19.8"),
                ),
                variables={"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"},
                after=_BUILD_AIO,
            ),
            Recipe(
                name="llama.cpp",
                steps=(("--no-cache-dir", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"),),
                variables={
                    "CMAKE_BUILD_PARALLEL_LEVEL": "2",
                    "CMAKE_ARGS": " ".join(_llama_cmake_options()),
                },
            ),
            Recipe(name="plot", steps=(("matplotlib==3.11.2",),), variables={}),
        )
    }


# init_distributed on a CPU compiles an operator as well: both are built here, none at a measured start
_BUILD_AIO = """
import os
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29591")
import deepspeed
from deepspeed.ops.op_builder import AsyncIOBuilder
AsyncIOBuilder().load()
deepspeed.init_distributed("gloo")
import torch
torch.distributed.destroy_process_group()
"""


def _llama_cmake_options() -> list[str]:
    options = ["-DGGML_NATIVE=ON", "-DLLAVA_BUILD=OFF", "-DMTMD_BUILD=OFF"]
    if platform.machine() == "x86_64":
        # its AMX path crashed with Q4_0; explicit flags win over -march=native
        no_amx = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
        options += [f"'-DCMAKE_C_FLAGS={no_amx}'", f"'-DCMAKE_CXX_FLAGS={no_amx}'"]
    return options


def python_of(work: Path, name: str) -> Path:
    """The interpreter of an environment. Raises FileNotFoundError, saying how it is made."""
    folder = work / "environments" / name
    if not (folder / _STAMP).is_file():
        raise FileNotFoundError(f"no environment for {name} in {folder}: run `peers.py setup --work {work}` first")
    return folder / "bin" / "python"


def variables_of(work: Path, name: str) -> dict[str, str]:
    """os.environ as a peer gets it: its own tools first on PATH, nothing fetched at run time."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    variables.pop("PYTHONPATH", None)
    variables["PATH"] = f"{work / 'environments' / name / 'bin'}:{variables['PATH']}"
    if name == "deepspeed":
        variables |= {
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(work / "torch_extensions"),
            "MAX_JOBS": "2",
            "CXX": shutil.which("g++") or "g++",
        }
        unpacked = work / "libaio" / "usr"
        if unpacked.is_dir():
            libraries = unpacked / "lib" / f"{platform.machine()}-linux-gnu"
            variables |= {
                "CPATH": str(unpacked / "include"),
                "LIBRARY_PATH": str(libraries),
                "LD_LIBRARY_PATH": str(libraries),
                "CFLAGS": f"-I{unpacked / 'include'}",
                "LDFLAGS": f"-L{libraries}",
            }
    return variables


def set_up(work: Path, names: tuple[str, ...], say: Callable[[str], None]) -> None:
    """Make the named environments in turn. Raises RuntimeError with the end of a failed command's output."""
    known = recipes()
    for name in names:
        recipe, folder = known[name], work / "environments" / name
        stamp = hashlib.sha256(json.dumps([recipe.steps, dict(recipe.variables), recipe.after]).encode()).hexdigest()
        if (folder / _STAMP).is_file() and (folder / _STAMP).read_text() == stamp:
            say(f"{name}: is there")
            continue
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{name}: making {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if name == "deepspeed":
            _provide_libaio(work, say)
            release_locks(work)
        _run([sys.executable, "-m", "venv", str(folder)], dict(os.environ))
        python = str(folder / "bin" / "python")
        variables = {**variables_of(work, name), **recipe.variables}
        for step in recipe.steps:
            say(f"{name}: pip install {' '.join(step)}")
            _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step], variables)
        if recipe.after:
            say(f"{name}: compiling operators (minutes)")
            _run([python, "-c", recipe.after], variables)
        (folder / _STAMP).write_text(stamp)
        say(f"{name}: complete")


def release_locks(work: Path) -> None:
    """Forget builds that a killed process left half-way: torch waits for ever for a lock file that nobody holds.

    Not while another measurement builds in the same work directory.
    """
    for lock in (work / "torch_extensions").glob("*/lock"):
        lock.unlink()


def _provide_libaio(work: Path, say: Callable[[str], None]) -> None:
    """DeepSpeed's async_io compiles against libaio: take the distribution's package apart where it is not installed."""
    if Path("/usr/include/libaio.h").is_file() or (work / "libaio" / "usr").is_dir():
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RuntimeError("DeepSpeed's async_io needs libaio's headers: install the package libaio-dev")
    say("deepspeed: unpacking libaio-dev")
    packages = work / "libaio" / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", "libaio-dev", "libaio1"], dict(os.environ), packages)
    staged = work / "libaio" / "staged"
    for package in sorted(packages.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(staged)], dict(os.environ))
    libraries = staged / "usr" / "lib" / f"{platform.machine()}-linux-gnu"
    libraries.mkdir(parents=True, exist_ok=True)
    for library in staged.rglob("libaio.so*"):
        if library.parent != libraries and not library.is_symlink():
            shutil.copy2(library, libraries / library.name)
    shortest = libraries / "libaio.so"
    shortest.unlink(missing_ok=True)
    shortest.symlink_to(next(file.name for file in sorted(libraries.glob("libaio.so.1*")) if not file.is_symlink()))
    (staged / "usr").rename(work / "libaio" / "usr")


def _run(command: list[str], variables: dict[str, str], folder: Path | None = None) -> None:
    done = subprocess.run(
        command, env=variables, cwd=folder, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False
    )
    if done.returncode:
        tail = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"`{' '.join(command[:6])} …` ended with {done.returncode}:\n{tail}")
