"""The streamer: right bytes for every unit, read ahead across passes, and never data from a read that went wrong."""

from __future__ import annotations

import gc
import os
import shutil
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.device_copy import CpuCopy
from offload.format import blob_file
from offload.readers.scripted import Fail, Late, Never, ScriptedReader, Short
from offload.readers.threads import ThreadReader
from offload.residents import ResidentLoader
from offload.slots import POISON_BYTE, SlotState
from offload.streamer import Streamer
from offload.timeline import Timeline
from partition.errors import StoreError

NUM_UNITS = 6


class LazyCopy:
    """One copy: made when somebody has to have it, on whichever thread that is."""

    def __init__(self, source, target):
        self.tensors = (source, target)
        self.lock = threading.Lock()

    def finish(self):
        with self.lock:
            if self.tensors is not None:
                source, target = self.tensors
                target.copy_(source)
                self.tensors = None


class LazyDevice(CpuCopy):
    """A device within host memory that copies as late as it may: what is overwritten or read too early shows up."""

    in_place = False

    def __init__(self):
        self.by_device_slot = {}
        self.by_host_slot = {}
        self.computing = set()

    def start(self, source, target, device_slot, host_slot):
        if device_slot in self.by_device_slot or device_slot in self.computing:
            raise RuntimeError(f"device slot {device_slot} is overwritten before it was used")
        copy = self.by_device_slot[device_slot] = LazyCopy(source, target)
        if host_slot is not None:
            self.by_host_slot[host_slot] = copy

    def before_compute(self, device_slot):
        self.by_device_slot.pop(device_slot).finish()
        self.computing.add(device_slot)

    def after_compute(self, device_slot):
        self.computing.remove(device_slot)

    def read_again(self, host_slot):
        return self.by_host_slot.pop(host_slot).finish


@pytest.fixture(scope="module")
def store(tmp_path_factory, kit):
    """(directory, manifest's blobs in order of use, units)."""
    directory = tmp_path_factory.mktemp("store")
    units = kit.random_units(NUM_UNITS)
    manifest = kit.packed(directory, units)
    return directory, [manifest.blob(unit, 0) for unit in units], units


def make(store, reader, tiers="nvme", **options):
    directory, blobs, _ = store
    if isinstance(tiers, str):
        tiers = [tiers] * len(blobs)
    options = {"num_slots": 2, "num_device_slots": 2} | options
    return Streamer(directory=directory, blobs=blobs, tiers=tiers, reader=reader, **options)


def loaded(store, reader, tiers="nvme", **options):
    streamer = make(store, reader, tiers, **options)
    streamer.load(lambda done, total: None)
    return streamer


def one_pass(streamer, num_units=NUM_UNITS):
    for index in range(num_units):
        streamer.wait(index)
        streamer.release(index)


def test_a_read_is_in_the_timeline_when_it_ended_and_not_when_it_was_used(store):
    """The last reads of a run are ahead of a pass that never comes: pictures showed an idle disk there."""
    timeline = Timeline()
    streamer = loaded(store, ScriptedReader({1: Fail()}), timeline=timeline, num_slots=3)
    ahead, _ = timeline.drain()
    assert [(event.kind, event.unit, event.slot) for event in ahead] == [
        ("read", "layers.0", 0),
        ("read", "layers.2", 2),
    ]
    assert all(0 < event.start_s <= event.end_s and event.num_bytes for event in ahead)
    streamer.wait(0)
    events, _ = timeline.drain()
    assert "read" not in {event.kind for event in events}
    streamer.close()


TIERS = st.lists(st.sampled_from(["device", "host", "nvme"]), min_size=NUM_UNITS, max_size=NUM_UNITS)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tiers=TIERS,
    num_slots=st.integers(1, 8),
    num_device_slots=st.integers(1, 4),
    in_place=st.booleans(),
    threads=st.booleans(),
    poison=st.booleans(),
    verify=st.sampled_from(["first", "always", "never"]),
)
def test_every_unit_is_right_in_every_pass(
    store, kit, tiers, num_slots, num_device_slots, in_place, threads, poison, verify
):
    reader = ThreadReader(num_threads=2, block_bytes=4096) if threads else ScriptedReader()
    copy = None if in_place else LazyDevice()
    streamer = loaded(
        store,
        reader,
        tiers,
        num_slots=num_slots,
        num_device_slots=num_device_slots,
        poison=poison,
        verify=verify,
        copy=copy,
    )
    for _ in range(3):
        for index, shards in enumerate(store[2].values()):
            views = streamer.wait(index)
            assert all(kit.same_bits(views[name], tensor) for name, tensor in shards[0].items())
            streamer.release(index)
        assert streamer.is_idle
        assert SlotState.IN_USE not in streamer.slot_states
    stats = streamer.snapshot()
    lengths = [blob.length for blob in store[1]]
    streamed = [index for index, tier in enumerate(tiers) if tier == "nvme"]
    passes = 3 * sum(lengths[index] for index in streamed)
    resident = sum(lengths[index] for index in range(NUM_UNITS) if index not in streamed)
    assert stats.num_passes == 3
    if in_place:
        assert stats.bytes_read == passes + resident
        assert stats.bytes_copied == 0
        assert stats.num_waits == 3 * len(streamed)
    assert stats.num_verified >= {"first": NUM_UNITS, "always": NUM_UNITS + 2 * len(streamed), "never": 0}[verify]
    streamer.close()
    streamer.close()
    assert set(streamer.slot_states) <= {SlotState.FREE}
    reader.close()


def test_the_first_units_of_the_next_pass_are_read_at_the_end_of_this_one(store):
    reader = ScriptedReader()
    tiers = ["host", "nvme", "host", "nvme", "nvme", "host"]
    streamer = loaded(store, reader, tiers, num_slots=2)
    num_loaded = 3
    names = [submission.file.path.name for submission in reader.submissions[num_loaded:]]
    assert names == [blob_file(f"layers.{n}", 0) for n in (1, 3)]  # before anybody waits
    one_pass(streamer)
    names = [submission.file.path.name for submission in reader.submissions[num_loaded:]]
    assert names == [blob_file(f"layers.{n}", 0) for n in (1, 3, 4, 1, 3)]
    assert streamer.is_idle


def test_views_are_made_once_and_nothing_is_allocated_in_later_passes(store):
    reader = ScriptedReader()
    streamer = loaded(store, reader, num_slots=3)
    seen = [[], []]
    for number in range(2):
        for index in range(NUM_UNITS):
            seen[number].append(dict(streamer.wait(index)))
            streamer.release(index)
    for first, second in zip(*seen, strict=True):
        assert all(first[name] is second[name] for name in first)


def test_units_out_of_order_are_our_own_bug(store):
    streamer = make(store, ScriptedReader())
    with pytest.raises(RuntimeError, match="new"):
        streamer.wait(0)
    streamer.load(lambda done, total: None)
    with pytest.raises(RuntimeError, match="turn is 0"):
        streamer.wait(1)
    with pytest.raises(RuntimeError, match="no unit is in use"):
        streamer.release(0)
    streamer.wait(0)
    with pytest.raises(RuntimeError, match="still in use"):
        streamer.wait(0)
    with pytest.raises(RuntimeError, match="0 is in use"):
        streamer.release(1)
    streamer.release(0)
    streamer.wait(1)
    streamer.close()
    with pytest.raises(RuntimeError, match="closed"):
        streamer.wait(2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_slots": 0}, "0 slots"),
        ({"num_device_slots": 0, "copy": LazyDevice()}, "0 device slots"),
        ({"verify": "sometimes"}, "sometimes"),
        ({"tiers": ["nvme"]}, "6 units, 1 tiers"),
        ({"tiers": "disk"}, "disk"),
    ],
)
def test_wrong_plans_are_refused(store, options, words):
    with pytest.raises(ValueError, match=words):
        make(store, ScriptedReader(), **options)


def test_progress_of_loading_counts_units(store):
    seen = []
    make(store, ScriptedReader(), ["host", "nvme", "device", "nvme", "host", "nvme"]).load(
        lambda done, total: seen.append((done, total))
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("step", "words"),
    [(Fail("Input/output error"), "Input/output error"), (Short(100), "brought 100 bytes instead of")],
)
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_bad_read_is_an_error_and_never_data(store, step, words, at, in_place):
    """Also of a read that was made ahead, also in the second pass, also with checksums off."""
    reader = ScriptedReader({at: step})
    streamer = make(store, reader, verify="never", copy=None if in_place else LazyDevice(), poison=True)
    done = 0

    def walk():
        nonlocal done
        streamer.load(lambda loaded, total: None)
        for _ in range(2):
            for index in range(NUM_UNITS):
                streamer.wait(index)
                done += 1
                streamer.release(index)

    with pytest.raises(StoreError, match=words):
        walk()
    assert done <= at
    with pytest.raises(RuntimeError, match="failed"):
        streamer.wait(at % NUM_UNITS)
    streamer.close()
    assert set(streamer.slot_states) <= {SlotState.FREE}


def test_what_a_short_read_left_out_is_nan_when_poisoned(store):
    reader = ScriptedReader({0: Short(256)})
    streamer = loaded(store, reader, poison=True)
    slot = streamer._ring.buffer(0).tensor
    assert (slot[256:] == POISON_BYTE).all()
    with pytest.raises(StoreError, match="256 bytes"):
        streamer.wait(0)


@pytest.mark.parametrize("tiers", ["nvme", "host"])
def test_a_read_that_never_ends_hits_the_deadline(store, tiers):
    reader = ScriptedReader({1: Never()})
    streamer = make(store, reader, tiers, read_timeout_s=0.05)

    def walk():
        streamer.load(lambda done, total: None)
        one_pass(streamer)

    with pytest.raises(StoreError, match=r"unit 'layers\.1' from .*layers\.1\.tp0\.bin was not done after 0\.05 s"):
        walk()
    with pytest.raises(StoreError, match="still under way"):
        streamer.close()
    streamer.close()


def test_late_and_out_of_order_reads_are_waited_for(store, kit):
    reader = ScriptedReader({0: Late(0.05), 4: Late(0.02)})
    streamer = loaded(store, reader, num_slots=4)
    for index, shards in enumerate(store[2].values()):
        views = streamer.wait(index)
        assert all(kit.same_bits(views[name], tensor) for name, tensor in shards[0].items())
        streamer.release(index)
    stats = streamer.snapshot()
    assert stats.stall_s_per_unit["layers.0"] == stats.longest_stall_s > 0
    assert stats.stall_s == pytest.approx(sum(stats.stall_s_per_unit.values()))
    streamer.close()
    reader.close()


@pytest.fixture
def own_store(store, tmp_path):
    """A copy to damage."""
    shutil.copytree(store[0], tmp_path / "copy")
    return tmp_path / "copy", *store[1:]


def flip_bit(directory, unit):
    """As a failing disk does it: without a new time of the last write."""
    path = directory / blob_file(unit, 0)
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(10)
        byte = file.read(1)[0]
        file.seek(10)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("tier", ["nvme", "host", "device"])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("num_slots", [1, 9])
def test_a_flipped_bit_is_an_error(own_store, tier, in_place, num_slots):
    flip_bit(own_store[0], "layers.4")
    streamer = make(own_store, ScriptedReader(), tier, num_slots=num_slots, copy=None if in_place else LazyDevice())

    def walk():
        streamer.load(lambda done, total: None)
        one_pass(streamer)

    with pytest.raises(StoreError, match=r"unit 'layers\.4' in .*layers\.4\.tp0\.bin is damaged.*dist-infer verify"):
        walk()
    streamer.close()


def test_first_checks_once_and_always_checks_every_read(own_store):
    readers = {"first": ScriptedReader(), "always": ScriptedReader()}
    streamers = {verify: loaded(own_store, reader, verify=verify) for verify, reader in readers.items()}
    for streamer in streamers.values():
        one_pass(streamer)
    flip_bit(own_store[0], "layers.3")
    one_pass(streamers["first"])
    assert streamers["first"].snapshot().num_verified == NUM_UNITS
    with pytest.raises(StoreError, match=r"layers\.3"):
        one_pass(streamers["always"])


def test_a_file_cut_off_while_it_is_streamed_is_a_typed_error(own_store):
    reader = ThreadReader(num_threads=2, block_bytes=4096)
    streamer = loaded(own_store, reader, num_slots=1)
    one_pass(streamer)
    with open(own_store[0] / blob_file("layers.5", 0), "r+b") as file:
        file.truncate(100)
    with pytest.raises(StoreError, match=r"layers\.5.*wanted .* got 100"):
        one_pass(streamer)
    streamer.close()
    reader.close()


def test_loading_to_a_device_goes_through_small_pieces(store, kit):
    """Host memory for loading is bounded by the pieces, not by the largest unit on the device."""
    reader = ScriptedReader()
    plain = make(store, reader, "device", copy=LazyDevice())
    loader = ResidentLoader(
        directory=store[0],
        blobs=store[1],
        reader=reader,
        check=plain._check,
        copy=LazyDevice(),
        stats=plain._stats,
        timeout_s=5.0,
        staging_bytes=4096,
    )
    for index, buffer in loader.to_device(range(NUM_UNITS)):
        content = (store[0] / store[1][index].file).read_bytes()
        assert buffer.numpy().tobytes() == content
    assert max(submission.length for submission in reader.submissions) == 4096
    assert len(reader.submissions) == sum(blob.length for blob in store[1]) // 4096
    assert plain.snapshot().num_verified == NUM_UNITS


def test_close_lets_the_memory_go(store, tmp_path, kit):
    """Slots and resident units are mappings of their own: none is left after close."""
    size = 24 * 2**20
    units = {f"u{n}": [{"w": torch.zeros(size, dtype=torch.uint8)}] for n in range(3)}
    manifest = kit.packed(tmp_path, units)

    def mapped():
        with open("/proc/self/maps") as maps:
            spans = [line.split()[0].split("-") for line in maps]
        return sum(int(end, 16) - int(start, 16) for start, end in spans)

    gc.collect()  # what other tests left would go during this one, and be counted
    others = set(threading.enumerate())  # an engine that other tests share has its readers
    reader = ThreadReader()
    before = mapped()
    streamer = Streamer(
        directory=tmp_path,
        blobs=manifest.blobs,
        tiers=["host", "nvme", "nvme"],
        reader=reader,
        num_slots=2,
        num_device_slots=0,
    )
    streamer.load(lambda done, total: None)
    one_pass(streamer, 3)
    assert mapped() >= before + 3 * size
    streamer.close()
    reader.close()
    assert mapped() < before + size
    left = set(threading.enumerate()) - others
    assert not [thread for thread in left if thread.name.startswith("reader-")]
