"""FAULTS T19, T20: a store of another checkpoint, format, cut or type is refused or made again, never guessed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_infer.config import load_config
from dist_infer.startup import open_model, pack_model
from dist_infer.worker.setup import StoreLocation, store_key
from offload.format import MANIFEST_FILE, open_store, read_manifest
from offload.pack import PackReport
from partition.errors import StoreError
from partition.sharding import units_of


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to be edited."""
    return shutil.copytree(tiny_checkpoint("llama", num_hidden_layers=2), tmp_path / "model")


Pack = Callable[..., tuple[StoreLocation, PackReport]]


@pytest.fixture
def pack(model: Path, tmp_path: Path) -> Pack:
    """What every start does before its ranks are started."""

    def pack(**sections: dict[str, Any]) -> tuple[StoreLocation, PackReport]:
        config: dict[str, Any] = {
            "model": {"path": str(model)},
            "offload": {"store": str(tmp_path / "stores")},
            "cluster": {"device": "cpu"},
        }
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **values}
        loaded = load_config(config)
        return pack_model(loaded, open_model(loaded), lambda progress: None)

    return pack


def refuse(model: Path, location: StoreLocation) -> str:
    """The words with which a rank refuses to open the store."""
    units = [unit.name for unit in units_of(open_model(load_config({"model": {"path": str(model)}})).spec)]
    with pytest.raises(StoreError) as caught:
        open_store(Path(location.directory), store_key(location), units, range(location.tensor))
    return str(caught.value)


def test_a_source_with_a_new_time_is_packed_again(model, pack):
    """T19: same bytes, same size, new mtime: it may be another one."""
    first, report = pack()
    assert report.num_written == 4
    assert pack()[1].num_written == 0
    weights = model / "model.safetensors"
    facts = weights.stat()
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    second, report = pack()
    assert second.directory != first.directory
    assert report.num_written == 4


def test_a_source_with_new_weights_under_an_old_time_is_packed_again(model, pack):
    """T19: same size, same mtime, same header, other bytes. The new store holds the new weights."""
    first, _ = pack()
    weights = model / "model.safetensors"
    facts = weights.stat()
    tensors = {name: -tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    second, report = pack()
    assert second.directory != first.directory
    assert report.num_written == 4
    name = "model.embed_tokens.weight"
    packed = []
    for location in (first, second):
        blob = read_manifest(Path(location.directory)).blob("embed", 0)
        (array,) = [array for array in blob.tensors if array.name == name]
        content = (Path(location.directory) / blob.file).read_bytes()[array.offset : array.offset + array.num_bytes]
        packed.append(torch.frombuffer(bytearray(content), dtype=torch.float32).view(array.shape))
    assert torch.equal(packed[0], -packed[1])
    assert torch.equal(packed[1], tensors[name])


def test_a_store_of_an_older_format_is_refused_and_made_again(model, pack):
    """T20: also where entries are of the older format and the blobs look finished."""
    location, _ = pack()
    directory = Path(location.directory)
    digest = read_manifest(directory).digest
    for file in directory.glob("*.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "version": content["version"] - 1}))
    assert "format version" in refuse(model, location)
    _, report = pack()
    assert (report.num_written, report.num_reused) == (4, 0)
    assert read_manifest(directory).digest == digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parallel": {"tensor": 2}}, "tensor is 2, expected 1"),
        ({"model": {"dtype": "bfloat16"}}, "dtype is 'bfloat16', expected 'float32'"),
    ],
    ids=["tensor", "dtype"],
)
def test_a_store_of_another_cut_or_type_is_refused_and_made_again(model, pack, change, words):
    """T20: moved to where this run's store is, as somebody may who wants to save the time of packing."""
    location, _ = pack()
    directory = Path(location.directory)
    digest = read_manifest(directory).digest
    other, _ = pack(**change)
    assert other.directory != location.directory
    shutil.rmtree(directory)
    Path(other.directory).rename(directory)
    assert words in refuse(model, location)
    _, report = pack()
    assert (report.num_written, report.num_reused) == (4, 0)
    assert read_manifest(directory).digest == digest


def test_entries_of_another_store_do_not_make_its_blobs_finished(model, pack):
    """T20: without a manifest, as after an interrupted pack, each blob's own entry must be of this store."""
    location, _ = pack()
    other, _ = pack(model={"dtype": "bfloat16"})
    directory = Path(location.directory)
    digest = read_manifest(directory).digest
    shutil.copytree(other.directory, directory, dirs_exist_ok=True)
    (directory / MANIFEST_FILE).unlink()
    _, report = pack()
    assert (report.num_written, report.num_reused) == (4, 0)
    assert read_manifest(directory).digest == digest
