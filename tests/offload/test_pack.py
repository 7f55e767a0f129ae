"""Packing: bit-exact, resumable, one at a time, bounded in memory, honest about a full disk."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.blob import PIECE_BYTES, tensor_pieces
from offload.dtypes import dtype_named
from offload.format import DTYPE_BYTES, MANIFEST_FILE, blob_file, entry_file, read_manifest
from offload.pack import pack_store, verify_store
from offload.readers.scripted import ScriptedReader
from offload.streamer import Streamer
from partition.errors import StoreError


def files_of(directory):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()}


def read_back(directory, manifest):
    streamer = Streamer(
        directory=directory,
        blobs=manifest.blobs,
        tiers=["host"] * len(manifest.blobs),
        reader=ScriptedReader(),
        num_slots=0,
        num_device_slots=0,
    )
    streamer.load(lambda done, total: None)
    return streamer


@pytest.mark.parametrize("dtype", list(DTYPE_BYTES))
def test_round_trip_keeps_every_bit(tmp_path, kit, dtype):
    generator = torch.Generator().manual_seed(1)
    kind = dtype_named(dtype)
    shapes = [(), (0,), (1,), (7, 3), (2, 3, 5), (4, 0, 2), (129,)]
    shard = {f"t{shape}": kit.random_tensor(shape, torch.uint8, generator) for shape in [(3,)]}
    if kind is torch.bool:
        shard |= {str(shape): torch.ones(shape, dtype=kind) for shape in shapes}
    else:
        shard |= {str(shape): kit.random_tensor(shape, kind, generator) for shape in shapes}
    streamer = read_back(tmp_path, kit.packed(tmp_path, {"unit": [shard]}))
    views = streamer.wait(0)
    assert list(views) == list(shard)
    assert all(kit.same_bits(views[name], shard[name]) for name in shard)
    assert all(views[name].data_ptr() % 256 == 0 for name in shard if shard[name].numel())


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_view_is_cut_into_its_row_major_bytes(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    tensor = tensor[tuple(slice(None, None, data.draw(st.integers(1, 2))) for _ in shape)]
    if data.draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    max_bytes = data.draw(st.integers(1, 64)) * 4
    pieces = [bytes(piece) for piece in tensor_pieces(tensor, torch.empty(max_bytes, dtype=torch.uint8))]
    assert b"".join(pieces) == tensor.contiguous().numpy().tobytes()
    assert max(map(len, pieces)) <= max_bytes


def test_second_call_writes_nothing_and_loads_nothing(tmp_path, kit):
    units = kit.random_units(3, num_ranks=2)
    first = kit.pack(tmp_path, units)
    assert (first.num_written, first.num_reused) == (6, 0)
    assert first.bytes_written == sum(blob.length for blob in read_manifest(tmp_path).blobs)
    before = files_of(tmp_path)
    source = kit.TensorSource(units)
    report = pack_store(tmp_path, kit.key, list(units), [0, 1], source, kit.quiet)
    assert (report.num_written, report.num_reused, report.bytes_written) == (0, 6, 0)
    assert source.loads == []
    assert files_of(tmp_path) == before


def test_ranks_packed_one_after_another_share_a_manifest(tmp_path, kit):
    units = kit.random_units(2, num_ranks=2)
    whole = kit.packed(tmp_path / "whole", units)
    for rank in (1, 0):
        source = kit.TensorSource({unit: [shards[rank]] for unit, shards in units.items()})
        pack_store(tmp_path / "parts", kit.key, list(units), [rank], source, kit.quiet)
    assert read_manifest(tmp_path / "parts") == whole


def test_only_what_is_missing_damaged_in_size_or_foreign_is_written_again(tmp_path, kit):
    units = kit.random_units(5)
    manifest = kit.packed(tmp_path / "a", units)
    kit.pack(tmp_path / "b", units, replace(kit.key, fingerprint="other"))
    store = tmp_path / "a"
    (store / blob_file("layers.0", 0)).unlink()
    with open(store / blob_file("layers.1", 0), "ab") as file:
        file.write(b"x")
    (store / entry_file("layers.2", 0)).write_bytes((tmp_path / "b" / entry_file("layers.2", 0)).read_bytes())
    (store / entry_file("layers.3", 0)).write_text("{")
    (store / "layers.9.tp0.bin.tmp").write_text("left over")
    source = kit.TensorSource(units)
    report = pack_store(store, kit.key, list(units), [0], source, kit.quiet)
    assert source.loads == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert (report.num_written, report.num_reused) == (4, 1)
    assert read_manifest(store) == manifest
    assert not list(store.glob("*.tmp"))


def test_while_a_blob_is_missing_there_is_no_manifest(tmp_path, kit):
    """A manifest left over would vouch for the new bytes with the old checksum."""
    units = kit.random_units(3)
    kit.pack(tmp_path, units)
    (tmp_path / blob_file("layers.1", 0)).unlink()

    class Broken(kit.TensorSource):
        def load_unit(self, unit):
            raise StoreError("the source is gone")

    with pytest.raises(StoreError, match="the source is gone"):
        pack_store(tmp_path, kit.key, list(units), [0], Broken(units), kit.quiet)
    assert not (tmp_path / MANIFEST_FILE).exists()
    assert not (tmp_path / entry_file("layers.1", 0)).exists()
    assert kit.pack(tmp_path, units).num_reused == 2


def test_files_of_others_in_the_directory_do_no_harm(tmp_path, kit):
    (tmp_path / "my notes.tp0.json").write_text("{}")
    assert len(kit.packed(tmp_path, kit.random_units(2)).blobs) == 2


def test_wrong_number_of_shards_is_the_sources_bug(tmp_path, kit):
    source = kit.TensorSource(kit.random_units(1, num_ranks=1))
    with pytest.raises(ValueError, match=r"1 shards of layers\.0 for 2 ranks"):
        pack_store(tmp_path, kit.key, ["layers.0"], [0, 1], source, kit.quiet)


def test_killed_at_every_step_it_resumes_to_the_same_manifest(tmp_path, kit):
    """kill -9 at each open, rename and removal, and in the middle of loading: what is on disk is never wrong."""
    units = kit.random_units(3, num_ranks=2)
    expected = kit.packed(tmp_path / "calm", units).digest
    store = tmp_path / "store"
    steps = 0

    def pack_until(step):
        seen = 0

        def die_at(event, _):
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.posix_fallocate"):
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        class Mortal(kit.TensorSource):
            def load_unit(self, unit):
                die_at("open", None)
                return super().load_unit(unit)

        sys.addaudithook(die_at)
        pack_store(store, kit.key, list(units), [0, 1], Mortal(units), kit.quiet)

    while True:  # each round starts from nothing, dies one step later, and is then resumed
        steps += 1
        code, error = kit.in_child(partial(pack_until, steps))
        if code == 0:
            break
        assert code == -signal.SIGKILL, error
        if (store / MANIFEST_FILE).exists():
            assert read_manifest(store).digest == expected
        kit.pack(store, units)
        assert read_manifest(store).digest == expected
        assert verify_store(store, lambda done, total: None).bad == ()
        for path in store.iterdir():
            path.unlink()
    assert steps > 20


def hear(descriptor):
    """A byte of a pipe, or an error: a packer that does not wait must fail the test and not hang it."""
    ready, _, _ = select.select([descriptor], [], [], 10)
    if not ready:
        raise TimeoutError("nothing came through the pipe")
    os.read(descriptor, 1)


def test_two_packers_at_once_pack_once(tmp_path, kit):
    units = kit.random_units(3)
    go_read, go_write = os.pipe()
    started_read, started_write = os.pipe()
    waiting_read, waiting_write = os.pipe()

    class Slow(kit.TensorSource):
        def load_unit(self, unit):
            if not self.loads:
                os.write(started_write, b"s")
                hear(go_read)
            return super().load_unit(unit)

    def work():
        def progress(step):
            if "waiting" in step.message:
                os.write(waiting_write, b"w")

        source = Slow(units)
        report = pack_store(tmp_path, kit.key, list(units), [0], source, progress, lock_timeout_s=20)
        return [report.num_written, report.num_reused, source.loads]

    first = kit.start_child(work)
    hear(started_read)
    second = kit.start_child(work)
    hear(waiting_read)
    os.write(go_write, b"g")
    assert kit.finish_child(*first) == (0, [3, 0, list(units)])
    assert kit.finish_child(*second) == (0, [0, 3, []])
    for descriptor in (go_read, go_write, started_read, started_write, waiting_read, waiting_write):
        os.close(descriptor)


def test_a_packer_that_never_ends_is_not_waited_for_for_ever(tmp_path, kit):
    units = kit.random_units(1)
    caught = []

    class Nested(kit.TensorSource):
        def load_unit(self, unit):
            with pytest.raises(StoreError, match=r"another process has been packing .* 0 s") as error:
                pack_store(tmp_path, kit.key, list(units), [0], self, kit.quiet, lock_timeout_s=0.05)
            caught.append(error)
            return super().load_unit(unit)

    pack_store(tmp_path, kit.key, list(units), [0], Nested(units), kit.quiet)
    assert len(caught) == 1
    assert kit.pack(tmp_path, units).num_reused == 1  # and the one who gave up does not take the lock later


def test_too_little_space_is_refused_before_anything_is_loaded(tmp_path, kit):
    units = kit.random_units(2)
    source = kit.TensorSource(units)
    planned = {("layers.0", 0): 4096, ("layers.1", 0): 2**60}
    with pytest.raises(StoreError, match=rf"needs .*\({2**60 + 4096} bytes\) more, free are .* too full to start"):
        pack_store(tmp_path, kit.key, list(units), [0], source, kit.quiet, planned_bytes=planned)
    assert source.loads == []


def test_a_disk_that_fills_up_on_the_way(tmp_path, kit):
    """On a small file system of its own: typed error with need and free, no manifest, and it resumes with space."""
    generator = torch.Generator().manual_seed(3)
    units = {f"u{n}": [{"w": kit.random_tensor((300_000,), torch.uint8, generator)}] for n in range(4)}
    expected = kit.packed(tmp_path / "calm", units).digest
    disk = tmp_path / "disk"
    disk.mkdir()

    class Filling(dict):
        """Somebody else fills the disk after the packer looked at the free space."""

        num_looks = 0

        def items(self):
            self.num_looks += 1
            if self.num_looks == 2:  # write_blob, about to lay it out
                facts = os.statvfs(disk)
                (disk / "filler").write_bytes(bytes((facts.f_bavail - 2) * facts.f_bsize))
            return super().items()

    def work():
        libc = ctypes.CDLL(None, use_errno=True)
        new_user, new_mounts, private = 0x10000000, 0x20000, 0x44000
        if libc.unshare(new_mounts if os.geteuid() == 0 else new_mounts | new_user):
            raise OSError(ctypes.get_errno(), "unshare")
        libc.mount(b"none", b"/", None, private, None)
        if libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=1m"):
            raise OSError(ctypes.get_errno(), "mount")
        store = disk / "store"
        errors = []
        try:  # four units need 1.2 MB: this disk holds three
            kit.pack(store, units)
        except StoreError as error:
            errors.append(
                [error.exit_code, str(error), (store / MANIFEST_FILE).exists(), len(list(store.glob("*.tmp")))]
            )
        libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 32, b"size=3m")  # remount
        source = kit.TensorSource({**units, "u3": [Filling(units["u3"][0])]})
        try:
            pack_store(store, kit.key, list(units), [0], source, kit.quiet)
        except StoreError as error:
            errors.append(
                [error.exit_code, str(error), (store / MANIFEST_FILE).exists(), len(list(store.glob("*.tmp")))]
            )
        (disk / "filler").unlink()
        source = kit.TensorSource(units)
        pack_store(store, kit.key, list(units), [0], source, kit.quiet)
        return [errors, source.loads, read_manifest(store).digest]

    code, result = kit.in_child(work)
    assert code == 0, result
    errors, loads, digest = result
    assert len(errors) == 2
    for exit_code, message, has_manifest, num_leftovers in errors:
        assert exit_code == 3
        assert "(303104 bytes) more, free are" in message
        assert not has_manifest
        assert num_leftovers == 0
    assert "too full to start" in errors[0][1]
    assert "No space left on device" in errors[1][1]
    assert loads == ["u3"]
    assert digest == expected


MEASURED_PACK = """
import sys
from pathlib import Path
import torch
from offload.format import StoreKey
from offload.pack import pack_store

UNIT_BYTES = int(sys.argv[2])

class Fresh:
    def load_unit(self, unit):
        tensor = torch.ones(UNIT_BYTES // 4096, 4096, dtype=torch.uint8)
        return [{"turned": tensor.t()}]

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

key = StoreKey(fingerprint="f", model_type="llama", dtype="uint8", encoding="float", tensor=1)
before = status("VmRSS")
pack_store(Path(sys.argv[1]), key, ["a", "b", "c"], [0], Fresh(), lambda progress: None)
print(status("VmHWM") - before)  # not ru_maxrss: across exec that keeps the peak of whoever forked
"""


def test_memory_of_packing_is_one_unit_and_a_piece(tmp_path):
    """A unit kept while the next is loaded, or a whole copy of a tensor that is not contiguous, would show here.

    In an interpreter of its own: a fork of this one would start with whatever earlier tests left to reuse.
    """
    unit_bytes = 96 * 2**20
    command = [sys.executable, "-c", MEASURED_PACK, str(tmp_path), str(unit_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert unit_bytes * 0.5 < int(done.stdout) < unit_bytes + PIECE_BYTES + 32 * 2**20


def test_verify_names_every_bad_blob(tmp_path, kit):
    manifest = kit.packed(tmp_path, kit.random_units(4))
    with open(tmp_path / blob_file("layers.1", 0), "r+b") as file:
        file.seek(300)
        byte = file.read(1)[0]
        file.seek(300)
        file.write(bytes([byte ^ 1]))
    (tmp_path / blob_file("layers.3", 0)).unlink()
    with open(tmp_path / blob_file("layers.2", 0), "r+b") as file:
        file.truncate(4096)
    seen = []
    report = verify_store(tmp_path, lambda done, total: seen.append((done, total)))
    assert [(bad.unit, bad.tp_rank) for bad in report.bad] == [("layers.1", 0), ("layers.2", 0), ("layers.3", 0)]
    assert report.bad[0].expected == manifest.blob("layers.1", 0).digest
    assert len(report.bad[0].actual) == 32
    assert report.bad[2].actual == "missing"
    assert report.bad[1].actual == f"4096 bytes instead of {manifest.blob('layers.2', 0).length}"
    assert report.num_checked == 4
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
