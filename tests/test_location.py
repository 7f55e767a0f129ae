"""What `model.path` may mean, and that a reference never leads out of the place it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_infer.location import resolve_model
from partition.errors import CheckpointError, ConfigError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package with a file, one below it, and code that must not run."""
    directory = tmp_path / "some_weights"
    (directory / "deep").mkdir(parents=True)
    (directory / "__init__.py").write_text("raise RuntimeError('a reference imported the package')")
    (directory / "model.gguf").write_bytes(b"GGUF")
    (directory / "deep" / "other.gguf").write_bytes(b"GGUF")
    (tmp_path / "secret").write_text("outside")
    monkeypatch.syspath_prepend(tmp_path)
    return directory


def test_local_paths_come_back_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model") == Path("org/model")  # what is there is never taken for a hub id


def test_a_file_inside_a_package_is_found_without_importing_it(package: Path) -> None:
    assert resolve_model("package:some_weights/model.gguf") == package / "model.gguf"
    assert resolve_model("package:some_weights/deep/other.gguf") == package / "deep" / "other.gguf"


@pytest.mark.parametrize(
    "reference",
    [
        "package:some_weights/../secret",
        "package:some_weights/deep/../../secret",
        "package:some_weights//etc/passwd",  # an absolute file took the place of the package's directory
        "package:some_weights/",
        "package:some_weights",
        "package:/model.gguf",
        "package:some.weights/model.gguf",
        "package:../some_weights/model.gguf",
        "package:",
        "package:some_weights/a\0b",
    ],
)
def test_a_reference_that_is_none_or_leads_outside_is_refused(package: Path, reference: str) -> None:
    with pytest.raises(ConfigError, match="write package:NAME/FILE"):
        resolve_model(reference)


def test_a_missing_package_and_a_missing_file_are_told_apart(package: Path) -> None:
    with pytest.raises(CheckpointError, match="'not_there_at_all' is not installed"):
        resolve_model("package:not_there_at_all/model.gguf")
    with pytest.raises(CheckpointError, match=r"no file 'x\.gguf'; GGUF files there: model\.gguf"):
        resolve_model("package:some_weights/x.gguf")


@pytest.mark.parametrize("name", ["sys", "__main__", "this_module"])
def test_a_module_that_is_no_package_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`__main__` has no spec, which importlib answers with ValueError."""
    (tmp_path / "this_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match=repr(name)):
        resolve_model(f"package:{name}/x.gguf")


@pytest.mark.parametrize("path", ["/no/such/place", "no/such/place", "./x/y", "nothing", "~/no-such-model-here"])
def test_a_path_with_nothing_there_says_what_may_be_written(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json and safetensors"):
        resolve_model(path)


@pytest.mark.parametrize("path", ["x" * 5000, "~no-such-user-here/x"])
def test_a_path_that_cannot_even_be_looked_at_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="cannot look for a model"):
        resolve_model(path)


def test_a_hub_id_without_a_network_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole tests run with HF_HUB_OFFLINE=1 (conftest), so nothing is asked of any network."""
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'nobody-here/nothing' is no path on this machine, and fetching"):
        resolve_model("nobody-here/nothing")
