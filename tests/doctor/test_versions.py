"""Other versions and foreign packages, planted on the path of a real process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dist_infer
from dist_infer.messages import decode
from launch.doctor.versions import VersionFacts, judge_versions, read_versions

ROOT = Path(dist_infer.__file__).resolve().parent.parent
READ = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "from launch.doctor.versions import read_versions\nfrom dist_infer.messages import encode\n"
    "facts = read_versions()\nassert 'torch' not in sys.modules\nsys.stdout.buffer.write(encode(facts))"
)


def pretend(directory: Path, name: str, version: str) -> None:
    """As `pip install` leaves it."""
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def read_with(first: Path) -> VersionFacts:
    """What a process reports that has this directory first on its path."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", READ, str(first)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return decode(VersionFacts, done.stdout)


def test_another_version_on_one_node_is_an_error_there(tmp_path: Path) -> None:
    """Guards reading versions from what would be imported, without importing it."""
    pretend(tmp_path, "transformers", "4.0.0")
    here, other = read_versions(), read_with(tmp_path)
    (finding,) = judge_versions({"a": here, "b": other, "c": here}, here="a", needs_ray=True)
    assert (finding.severity, finding.where, finding.exit_code) == ("error", "b", 4)
    assert finding.what == f"transformers is 4.0.0 there and {here.versions['transformers']} on a"


def test_another_build_of_the_same_torch_is_a_warning(tmp_path: Path) -> None:
    """Nodes with and without GPUs may well have different builds."""
    here = read_versions()
    pretend(tmp_path, "torch", here.versions["torch"].partition("+")[0] + "+cu999")
    (finding,) = judge_versions({"a": here, "b": read_with(tmp_path)}, here="a", needs_ray=False)
    assert (finding.severity, finding.where) == ("warning", "b")


def test_a_foreign_package_is_named_with_its_place() -> None:
    """Its own way of being found is test_packaging's."""
    foreign = replace(read_versions(), intruder="the package 'offload' is found at /x")
    (finding,) = judge_versions({"a": foreign}, here="a", needs_ray=False)
    assert (finding.severity, finding.exit_code, finding.what) == ("error", 2, foreign.intruder)


def test_what_is_missing_is_said_once_and_only_where_it_is_needed() -> None:
    here = read_versions()
    bare = replace(here, versions={**here.versions, "ray": "not installed"})
    (finding,) = judge_versions({"a": here, "b": bare}, here="a", needs_ray=True)
    assert (finding.severity, finding.where, finding.what) == ("error", "b", "ray is not installed")
    (finding,) = judge_versions({"a": bare}, here="a", needs_ray=False)
    assert finding.severity == "ok"


def test_other_sources_of_the_same_version_are_seen(tmp_path: Path) -> None:
    """Working copies all say the same version: a node that was not updated would speak another dialect."""
    for name in ("partition", "offload", "dist_infer", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = read_with(tmp_path)
    assert before.root == str(tmp_path)
    assert before == read_with(tmp_path)
    with (tmp_path / "launch" / "cli.py").open("a") as file:
        file.write("\n")
    (finding,) = judge_versions({"a": before, "b": read_with(tmp_path)}, here="a", needs_ray=False)
    assert (finding.severity, finding.where) == ("error", "b")
    assert finding.what.startswith("dist-infer is 0")
