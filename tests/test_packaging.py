"""What other people install: four packages, complete, that work anywhere; and a surface that changes on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dist_infer
from launch import root_guard
from partition.errors import ConfigError

ROOT = Path(dist_infer.__file__).resolve().parent.parent
PACKAGES = {"partition", "offload", "dist_infer", "launch"}


def python(code: str, cwd: Path, *search: Path) -> subprocess.CompletedProcess[str]:
    """The code in a fresh interpreter elsewhere, with these directories first on its import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources (building leaves traces), unpacked."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in [*PACKAGES, "tests", "docs"]:
        if (ROOT / name).is_dir():  # tests and docs are there to be left out
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    assert wheel.name == f"dist_infer-{dist_infer.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


@pytest.mark.slow
def test_the_wheel_holds_the_four_packages_and_all_of_them(unpacked: Path) -> None:
    found = {path.name for path in unpacked.iterdir()}
    assert found == PACKAGES | {f"dist_infer-{dist_infer.__version__}.dist-info"}
    for name in PACKAGES:
        sources = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".json")}
        packed = {
            path.relative_to(unpacked) for path in (unpacked / name).rglob("*") if path.suffix in (".py", ".json")
        }
        assert packed == sources
    assert (unpacked / "partition" / "families.json").is_file()
    for name in PACKAGES:
        assert (unpacked / name / "py.typed").is_file(), name
    entry_points = next(unpacked.glob("*.dist-info/entry_points.txt")).read_text()
    assert "dist-infer = launch.entry:main" in entry_points
    assert "ray = launch.backend:RayBackend" in entry_points


@pytest.mark.slow
def test_the_wheel_works_from_anywhere(unpacked: Path, tmp_path: Path) -> None:
    code = (
        _NOT_EDITABLE + "import dist_infer, partition, launch.cli\n"
        "from launch.root_guard import check_one_root\ncheck_one_root()\n"
        "from partition.families import family_of\nfamily_of('llama')\n"
        "print(dist_infer.__file__, [m for m in ('torch', 'ray') if m in sys.modules])"
    )
    done = python(code, tmp_path, unpacked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{unpacked / 'dist_infer' / '__init__.py'} []"


# an editable installation finds our modules even behind an intruder's, which other installations do not
_NOT_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]\n"


@pytest.mark.parametrize("name", ["offload", "dist_infer", "partition"])
def test_a_foreign_package_ends_the_command_line_with_its_place(name: str, tmp_path: Path) -> None:
    """Everything of ours imports `partition`: the guard must come first, and without it."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    done = python(_NOT_EDITABLE + "from launch.entry import main; main()", tmp_path, tmp_path, ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: the package {name!r} is found at {tmp_path / name / '__init__.py'}, not")


@pytest.mark.parametrize("name", ["offload", "launch", "dist_infer"])
def test_the_guard_names_an_intruder(name: str, tmp_path: Path) -> None:
    """A directory of the user's called like one of ours, in front of it on the path."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('guard', {root_guard.__file__!r})\n"
        "guard = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(guard)\n"
        "try:\n    guard.check_one_root()\nexcept ValueError as error:\n    print(error)\n"
    )
    done = python(code, tmp_path, tmp_path, ROOT)
    assert done.returncode == 0, done.stderr
    assert f"the package {name!r} is found at {tmp_path / name / '__init__.py'}, not beside" in done.stdout


def test_a_namespace_package_in_front_is_an_intruder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'partition' is found at None"):
        root_guard.check_one_root()


def test_all_is_well_here() -> None:
    root_guard.check_one_root()


# ---- the surface


def test_the_public_names_are_these() -> None:
    """So that a change is deliberate."""
    assert sorted(dist_infer.__all__) == [
        "CompletionOutput",
        "Failed",
        "Finished",
        "Grammar",
        "LLM",
        "RequestOutput",
        "RunConfig",
        "SamplingParams",
        "TokenEvent",
        "__version__",
        "errors",
        "load_config",
    ]
    for name in dist_infer.__all__:
        assert getattr(dist_infer, name) is not None
    assert dir(dist_infer) == sorted(dist_infer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LLm'"):
        dist_infer.LLm  # noqa: B018


def test_the_error_tree_is_public_with_its_exit_codes() -> None:
    found = {name: getattr(dist_infer.errors, name).exit_code for name in dist_infer.errors.__all__}
    assert found == {
        "DistInferError": 1,
        "ConfigError": 2,
        "BudgetError": 2,
        "CheckpointError": 3,
        "UnsupportedModelError": 3,
        "StoreError": 3,
        "ClusterError": 4,
        "ClusterGoneError": 4,
        "WorkerError": 4,
    }
    assert issubclass(dist_infer.errors.ConfigError, ValueError)


def test_the_version_is_one() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == dist_infer.__version__
