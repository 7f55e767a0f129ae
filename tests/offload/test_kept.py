"""Units of which a part stays in memory: right bytes wherever they are, only the rest is read, and damage is seen."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.encoded import EncodedTensor
from offload.quantize import encode
from offload.readers.scripted import ScriptedReader
from offload.streamer import Streamer
from offload.views import Kept
from partition.errors import StoreError
from partition.layout import ALIGN_BLOB, round_up

NUM_UNITS = 4


def cuts_of(blob):
    """Every way to keep the first arrays of a blob."""
    cuts = [Kept()]
    for last, following in itertools.pairwise(blob.tensors):
        kept = Kept(round_up(last.offset + last.num_bytes, ALIGN_BLOB), following.offset // ALIGN_BLOB * ALIGN_BLOB)
        if kept.kept_bytes < blob.length:
            cuts.append(kept)
    return cuts


@pytest.fixture(scope="module")
def store(tmp_path_factory, kit):
    """(directory, blobs, units): float and encoded tensors, some smaller than a page, none ending at one."""
    generator = torch.Generator().manual_seed(5)
    units = {}
    for index in range(NUM_UNITS):
        weight = torch.randn((48 + 16 * index, 96), generator=generator).bfloat16()
        units[f"layers.{index}"] = [
            {
                "norm": kit.random_tensor((5,), torch.float32, generator),
                "up": kit.random_tensor((37, 60), torch.bfloat16, generator),
                "gate": encode(weight, "int4-g32", torch.bfloat16),
                "bias": kit.random_tensor((3,), torch.bfloat16, generator),
                "down": kit.random_tensor((70, 70), torch.bfloat16, generator),
                "out": encode(weight, "int8", torch.bfloat16),
            }
        ]
    directory = tmp_path_factory.mktemp("store")
    manifest = kit.packed(directory, units)
    return directory, [manifest.blob(unit, 0) for unit in units], units


def loaded(store, kept, reader=None, tiers=("nvme",) * NUM_UNITS, **options):
    directory, blobs, _ = store
    streamer = Streamer(
        directory=directory,
        blobs=blobs,
        tiers=tiers,
        kept=kept,
        reader=reader or ScriptedReader(),
        num_slots=2,
        num_device_slots=0,
        **options,
    )
    streamer.load(lambda done, total: None)
    return streamer


def same(kit, found, expected):
    if isinstance(expected, EncodedTensor):
        return (
            (found.encoding, found.shape, found.dtype) == (expected.encoding, expected.shape, expected.dtype)
            and kit.same_bits(found.codes, expected.codes)
            and kit.same_bits(found.scales, expected.scales)
        )
    return kit.same_bits(found, expected)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), verify=st.sampled_from(["first", "always", "never"]))
def test_every_tensor_is_right_wherever_the_cut_is(store, kit, data, verify):
    _, blobs, units = store
    tiers = [data.draw(st.sampled_from(["nvme", "host"])) for _ in blobs]
    kept = [
        data.draw(st.sampled_from(cuts_of(blob))) if tier == "nvme" else Kept()
        for blob, tier in zip(blobs, tiers, strict=True)
    ]
    streamer = loaded(store, kept, tiers=tiers, verify=verify, poison=True)
    try:
        for index in (*range(NUM_UNITS), *range(NUM_UNITS)):
            views = streamer.wait(index)
            for name, tensor in units[f"layers.{index}"][0].items():
                assert same(kit, views[name], tensor), name
            streamer.release(index)
    finally:
        streamer.close()


def test_only_what_is_not_kept_is_read_again(store):
    """What a pass reads is what the planner counted: from `streamed_from` to the end."""
    _, blobs, _ = store
    kept = [cuts_of(blob)[-1] for blob in blobs]
    reader = ScriptedReader()
    streamer = loaded(store, kept, reader)
    loads = [(s.offset, s.length) for s in reader.submissions[:NUM_UNITS]]
    for index in range(NUM_UNITS):
        streamer.wait(index)
        streamer.release(index)
    reads = [(s.offset, s.length) for s in reader.submissions[NUM_UNITS : 2 * NUM_UNITS]]
    streamer.close()
    assert loads == [(0, part.kept_bytes) for part in kept]
    assert reads == [(p.streamed_from, b.length - p.streamed_from) for p, b in zip(kept, blobs, strict=True)]


@pytest.mark.parametrize("where", ["kept", "streamed", "both"])
def test_a_flipped_bit_is_found_in_either_part(store, tmp_path, where):
    """The checksum covers what stays and what is read, and the bytes that are in both."""
    directory, blobs, units = store
    kept = [cuts_of(blob)[2] for blob in blobs]
    part = kept[0]
    assert part.kept_bytes - part.streamed_from > 0
    position = {"kept": 3, "streamed": part.kept_bytes + 3, "both": part.streamed_from + 3}[where]
    copy = tmp_path / "store"
    shutil.copytree(directory, copy)
    streamer = None
    try:
        if where != "both":
            data = bytearray((copy / blobs[0].file).read_bytes())
            data[position] ^= 1
            (copy / blobs[0].file).write_bytes(data)
            streamer = loaded((copy, blobs, units), kept)
        else:
            streamer = loaded((copy, blobs, units), kept)
            streamer._prefixes[0][position] ^= 1  # as if the disk had answered differently the first time
        with pytest.raises(StoreError, match="damaged"):
            streamer.wait(0)
    finally:
        if streamer is not None:
            streamer.close()


def test_a_cut_through_a_tensor_is_refused(store):
    """A view that is half in one buffer and half in another would show foreign bytes."""
    _, blobs, _ = store
    down = next(array for array in blobs[0].tensors if array.name == "down")
    within = round_up(down.offset + 1, ALIGN_BLOB)
    wrong = [Kept(within, within), Kept(5, 0), Kept(2 * ALIGN_BLOB, 0), Kept(blobs[0].length, blobs[0].length)]
    for part in wrong:
        with pytest.raises(ValueError, match=r"keep|cut|multiples|leave"):
            loaded(store, [part, *[Kept()] * (NUM_UNITS - 1)])
    with pytest.raises(ValueError, match="a part is kept of units that stream"):
        loaded(store, [cuts_of(blobs[0])[1]] * NUM_UNITS, tiers=("host",) * NUM_UNITS)
