"""The packed store's JSON: what is refused, and with which words."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.dtypes import dtype_named
from offload.format import DTYPE_BYTES, MANIFEST_FILE, blob_file, open_store, read_manifest, store_directory
from partition.errors import StoreError
from partition.layout import ALIGN_BLOB, ALIGN_TENSOR, blob_layout


@given(st.lists(st.integers(0, 20_000), max_size=12))
def test_tensors_are_aligned_and_do_not_overlap(sizes):
    offsets, length = blob_layout(sizes)
    end = 0
    for offset, size in zip(offsets, sizes, strict=True):
        assert offset % ALIGN_TENSOR == 0
        assert end <= offset < end + ALIGN_TENSOR
        end = offset + size
    assert length % ALIGN_BLOB == 0
    assert end <= length < end + ALIGN_BLOB


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="-1"):
        blob_layout([4, -1])


def test_item_sizes_are_torchs():
    assert {name: dtype_named(name).itemsize for name in DTYPE_BYTES} == DTYPE_BYTES
    assert dtype_named("bfloat16") is torch.bfloat16


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_unit_names_cannot_leave_the_directory(name):
    with pytest.raises(ValueError, match="unit"):
        blob_file(name, 0)


def test_each_field_of_the_key_is_compared_and_named(tmp_path, kit):
    kit.pack(tmp_path, kit.random_units(1))
    for field in fields(kit.key):
        other = replace(kit.key, **{field.name: 7 if field.name == "tensor" else "other"})
        with pytest.raises(StoreError, match=rf"{field.name} is .*, expected {'7' if field.name == 'tensor' else ''}"):
            open_store(tmp_path, other, ["layers.0"], [0])


def test_stores_of_other_keys_live_side_by_side(tmp_path, kit):
    names = {store_directory(tmp_path, "org/Model 1", replace(kit.key, tensor=n)) for n in (1, 2, 4)}
    assert len(names) == 3
    assert all(path.parent == tmp_path and path.name.startswith("org-Model-1-") for path in names)


def test_a_directory_without_a_manifest_is_not_a_store(tmp_path, kit):
    with pytest.raises(StoreError, match=r"never finished.*dist-infer pack"):
        open_store(tmp_path, kit.key, [], [])


def test_wanted_blobs_must_be_there_with_their_size(tmp_path, kit):
    kit.pack(tmp_path, kit.random_units(2))
    open_store(tmp_path, kit.key, ["layers.0", "layers.1"], [0])
    with pytest.raises(StoreError, match=r"no unit .layers\.0. for tensor rank 1"):
        open_store(tmp_path, kit.key, ["layers.0"], [1])
    path = tmp_path / blob_file("layers.1", 0)
    length = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(length - 1)
    with pytest.raises(StoreError, match=f"has {length - 1} bytes, its entry says {length}"):
        open_store(tmp_path, kit.key, ["layers.1"], [0])
    path.unlink()
    with pytest.raises(StoreError, match="is missing"):
        open_store(tmp_path, kit.key, ["layers.1"], [0])


def _set(path, value):
    def change(manifest):
        target = manifest
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set(["version"], 99), "format version 99"),
        (_set(["version"], "1"), "format version '1'"),
        (_set(["surprise"], 1), "surprise"),
        (_set(["key", "tensor"], "1"), "key.tensor"),
        (_set(["key", "tensor"], 2), "checksum differs"),
        (_set(["blobs", 0, "digest"], "0" * 32), "checksum differs"),
        (_set(["blobs", 0, "length"], 4097), "need 4096 bytes"),
        (_set(["blobs", 0, "file"], "../../etc/passwd"), "passwd"),
        (_set(["blobs", 0, "unit"], "../x"), "contradicts itself"),
        (_set(["blobs", 0, "tensors", 0, "offset"], 256), "contradicts itself"),
        (_set(["blobs", 0, "tensors", 0, "shape"], [6]), "cannot have 20 bytes"),
        (_set(["blobs", 0, "tensors", 0, "shape"], [-1, -5]), "has shape"),
        (_set(["blobs", 0, "tensors", 0, "dtype"], "complex64"), "unknown dtype 'complex64'"),
        (_set(["blobs", 0, "tensors", 1, "name"], "norm.weight"), "listed twice"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, kit, change, words):
    kit.pack(tmp_path, kit.random_units(1))
    path = tmp_path / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=words):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "nul", "{}", "[" * 100_000, '{"version": 1}'])
def test_what_is_no_manifest_is_a_typed_error(tmp_path, text):
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        read_manifest(tmp_path)
