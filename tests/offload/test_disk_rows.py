"""An embedding on disk gives the rows that one in memory gives, and nothing that was not read."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from offload.disk_rows import disk_rows
from offload.readers.scripted import Fail, ScriptedReader, Short
from offload.readers.threads import ThreadReader
from offload.stats import StreamStats
from offload.streamer import Streamer
from partition.errors import StoreError

NAME = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def store(tmp_path_factory, kit):
    """(directory, blob, the matrix): rows of 74 bytes, so that many lie across a page's edge."""
    weight = torch.randn((700, 37), generator=torch.Generator().manual_seed(1)).bfloat16()
    directory = tmp_path_factory.mktemp("store")
    manifest = kit.packed(directory, {"embed": [{NAME: weight}]})
    return directory, manifest.blob("embed", 0), weight


def rows_of(store, reader):
    directory, blob, _ = store
    return disk_rows(directory, blob, reader, StreamStats(), 5.0)[NAME]


def test_every_row_is_the_one_in_the_matrix(store):
    """First, last, repeated, across pages, in any shape, as torch's own function is called by the module."""
    reader = ThreadReader(num_threads=2, block_bytes=4096)
    weight = store[2]
    for ids in (
        torch.arange(700),
        torch.tensor([[699, 0, 5, 5]]),
        torch.tensor([55]),
        torch.empty((1, 0), dtype=torch.long),
    ):
        assert torch.equal(functional.embedding(ids, rows_of(store, reader)), functional.embedding(ids, weight))
    reader.close()


def test_long_prompts_are_read_in_rounds(store, monkeypatch):
    """Memory stays within what the plan counts, whatever the number of tokens."""
    monkeypatch.setattr("offload.disk_rows.ROW_STAGING_BYTES", 5 * 4096)
    reader = ScriptedReader()
    assert torch.equal(rows_of(store, reader).rows(torch.arange(700)), store[2])


@pytest.mark.parametrize("step", [Fail(), Short(100)])
def test_a_read_that_went_wrong_gives_no_rows(store, step):
    with pytest.raises(StoreError, match="embed"):
        rows_of(store, ScriptedReader({1: step})).rows(torch.tensor([1, 300]))


def test_rows_that_do_not_exist_are_refused(store):
    """Bytes after the matrix are padding, or another tensor's."""
    for wrong in (-1, 700):
        with pytest.raises(IndexError):
            rows_of(store, ScriptedReader()).rows(torch.tensor([3, wrong]))


def test_nothing_else_may_be_done_with_it(store):
    """A model that used the embedding as a matrix would silently compute with nothing."""
    with pytest.raises(TypeError, match="on disk"):
        functional.linear(torch.zeros(1, 37, dtype=torch.bfloat16), rows_of(store, ScriptedReader()))


def test_its_checksum_is_compared_when_it_is_loaded(store, tmp_path):
    directory, blob, _ = store
    data = bytearray((directory / blob.file).read_bytes())
    data[40_000] ^= 1
    (tmp_path / blob.file).write_bytes(data)
    streamer = Streamer(
        directory=tmp_path, blobs=[blob], tiers=["rows"], reader=ScriptedReader(), num_slots=0, num_device_slots=0
    )
    with pytest.raises(StoreError, match="damaged"):
        streamer.load(lambda done, total: None)
    streamer.close()
