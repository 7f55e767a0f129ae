"""The one visible loop's other half: units in their known cyclic order, read ahead while the caller computes.

    streamer.load(progress)
    for every pass:
        for index in range(num_units):
            weights = streamer.wait(index)      # views, no copy
            ...compute...
            streamer.release(index)             # the next read of the cycle starts here, also across passes

On a CPU a host slot is what is computed from. On a GPU units go on to device slots (offload.device_stage). Routing,
model code and policy of what is resident do not belong here: the order and the tiers are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from offload.check import BlobCheck, VerifyPolicy
from offload.device_copy import DeviceCopy, copy_for
from offload.device_stage import DeviceStage
from offload.disk_rows import disk_rows
from offload.format import BlobEntry
from offload.read_ahead import ReadAhead
from offload.readers.port import Reader
from offload.residents import ResidentLoader
from offload.slots import SlotRing, SlotState
from offload.stats import StreamSnapshot, StreamStats
from offload.timeline import Timeline
from offload.views import Kept, UnitWeights, views_of
from partition.errors import StoreError

Tier = Literal["device", "host", "nvme", "rows"]
CLOSE_TIMEOUT_S = 5.0


class Streamer:
    """Weights of one rank, unit by unit. Owns its buffers and slots; the reader is the caller's. One thread uses it.

    Memory: resident units, `num_slots` host slots of the largest unit on nvme, and on a GPU `num_device_slots` of the
    largest unit that is not on the device; all of it is allocated by `load` at the latest, none in the loop.
    On a CPU "device" and "host" mean the same and `num_device_slots` is not used.
    `kept`: of each unit on nvme, what stays of it (CPU only); it is read by `load`, and never again.
    Units in tier "rows" (CPU only) stay on disk: what `wait` gives are DiskRows, read through `row_reader`.
    `copy` replaces the way to the device (tests run the GPU's logic with one that copies within host memory).
    `timeline`: where to note when each unit is read, waited for and computed; None: nowhere.
    """

    def __init__(
        self,
        *,
        directory: Path,
        blobs: Sequence[BlobEntry],
        tiers: Sequence[Tier],
        reader: Reader,
        num_slots: int,
        num_device_slots: int,
        device: str = "cpu",
        verify: VerifyPolicy = "first",
        read_timeout_s: float = 60.0,
        poison: bool = False,
        copy: DeviceCopy | None = None,
        kept: Sequence[Kept] | None = None,
        row_reader: Reader | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._blobs = tuple(blobs)
        self._kept = tuple(kept) if kept is not None else (Kept(),) * len(self._blobs)
        self._tiers = tuple(tiers)
        self._directory = directory
        self._reader = reader
        self._row_reader = row_reader
        self._timeout_s = read_timeout_s
        self._timeline = timeline
        self._num_device_slots = num_device_slots
        self._stats = StreamStats()
        self._check = BlobCheck(verify, directory, self._blobs, self._stats)
        self._copy = copy or copy_for(device, num_slots, num_device_slots)
        self._from_disk = tuple(index for index, tier in enumerate(self._tiers) if tier == "nvme")
        stays = ("device", "host", "rows") if self._copy.in_place else ("device",)
        self._resident = frozenset(index for index, tier in enumerate(self._tiers) if tier in stays)
        self._validate(num_slots)
        slot_bytes = max(
            (self._blobs[index].length - self._kept[index].streamed_from for index in self._from_disk), default=0
        )
        self._ring = SlotRing(num_slots if self._from_disk else 0, slot_bytes, self._copy, poison)
        self._read_ahead = ReadAhead(
            directory=directory,
            blobs=self._blobs,
            order=self._from_disk,
            ring=self._ring,
            reader=reader,
            check=self._check,
            stats=self._stats,
            timeout_s=read_timeout_s,
            kept=self._kept,
            timeline=timeline,
        )
        self._prefixes: dict[int, torch.Tensor] = {}  # of units on nvme that keep one
        self._stage: DeviceStage | None = None
        self._loader: ResidentLoader | None = None
        self._views: dict[tuple[int, int], UnitWeights] = {}  # by unit, slot (-1: resident)
        self._next = 0
        self._slot: int | None = None  # of the unit in use; -1 when it is resident
        self._state: Literal["new", "ready", "failed", "closed"] = "new"

    def load(self, progress: Callable[[int, int], None]) -> None:
        """Read and check the resident units, then start reading ahead; `progress` gets units loaded and their number.

        Raises:
            StoreError: a read failed or a checksum differs. Close the streamer then.
        """
        self._expect("new")
        self._state = "failed"  # until it is over
        loader = self._loader = ResidentLoader(
            directory=self._directory,
            blobs=self._blobs,
            reader=self._reader,
            check=self._check,
            copy=self._copy,
            stats=self._stats,
            timeout_s=self._timeout_s,
        )
        on_host = [index for index, tier in enumerate(self._tiers) if tier == "host"]
        on_device = [index for index, tier in enumerate(self._tiers) if tier == "device"]
        if self._copy.in_place:
            on_host, on_device = sorted(on_host + on_device), []
        prefixes = {index: self._kept[index].kept_bytes for index in self._from_disk if self._kept[index].kept_bytes}
        by_rows = [index for index, tier in enumerate(self._tiers) if tier == "rows"]
        num_loaded, num_total = 0, len(on_host) + len(on_device) + len(prefixes) + len(by_rows)
        host_buffers: dict[int, torch.Tensor] = {}
        progress(num_loaded, num_total)
        for index, buffer in loader.to_device(on_device):
            self._views[index, -1] = views_of(self._blobs[index], buffer)
            num_loaded += 1
            progress(num_loaded, num_total)
        for index in loader.checked(by_rows):
            self._views[index, -1] = disk_rows(
                self._directory, self._blobs[index], self._row_reader or self._reader, self._stats, self._timeout_s
            )
            num_loaded += 1
            progress(num_loaded, num_total)
        lengths = prefixes | {index: self._blobs[index].length for index in on_host}
        for index, buffer in loader.to_host(dict(sorted(lengths.items()))):
            if index in prefixes:
                self._prefixes[index] = buffer
            elif self._copy.in_place:
                self._views[index, -1] = views_of(self._blobs[index], buffer)
            else:
                host_buffers[index] = buffer
            num_loaded += 1
            progress(num_loaded, num_total)
        if not self._copy.in_place:
            self._stage = DeviceStage(
                blobs=self._blobs,
                order=[index for index in range(len(self._blobs)) if index not in self._resident],
                host=host_buffers,
                ring=self._ring,
                read_ahead=self._read_ahead,
                copy=self._copy,
                num_slots=self._num_device_slots,
                stats=self._stats,
                timeline=self._timeline,
            )
        self._read_ahead.start(self._prefixes)
        if self._stage is not None:
            self._stage.copy_ahead()
        self._state = "ready"

    def wait(self, index: int) -> UnitWeights:
        """The tensors of unit `index` by name: views on the device, valid until `release(index)`; do not write to them.

        Raises:
            StoreError: the unit's bytes could not be read, are damaged, or did not come in time. The streamer is of no
                use after that but for `close`.
            RuntimeError: units are not visited in order, or the unit before was not released.
        """
        self._expect("ready")
        if self._slot is not None or index != self._next:
            held = "" if self._slot is None else " and still in use"
            raise RuntimeError(f"wait({index}) out of order: the unit in turn is {self._next}{held}")
        if index in self._resident:
            self._slot = -1
            if self._timeline is not None:
                self._timeline.begin_compute()
            return self._views[index, -1]
        started = time.perf_counter()
        try:
            slot = self._read_ahead.next(index) if self._stage is None else self._stage.next(index)
        except BaseException:
            self._state = "failed"
            raise
        self._stats.add_stall(self._blobs[index].unit, time.perf_counter() - started)
        if self._timeline is not None:
            self._timeline.waited(self._blobs[index].unit, slot, started)
        self._slot = slot
        views = self._views.get((index, slot))
        if views is None:
            buffer = self._ring.buffer(slot).tensor if self._stage is None else self._stage.buffer(slot)
            views = views_of(self._blobs[index], buffer, self._prefixes.get(index), self._kept[index])
            self._views[index, slot] = views
        return views

    def release(self, index: int) -> None:
        """The caller enqueued its last use of unit `index`: its slot is read into again.

        Raises:
            StoreError: a unit that was read meanwhile is damaged or failed (on a GPU, where it is copied on from here).
            RuntimeError: the unit is not the one in use.
        """
        self._expect("ready")
        if self._slot is None or index != self._next:
            raise RuntimeError(f"release({index}), but {'no unit' if self._slot is None else self._next} is in use")
        slot, self._slot = self._slot, None
        if self._timeline is not None:
            self._timeline.end_compute(self._blobs[index].unit, slot, self._blobs[index].length)
        if slot >= 0:
            try:
                if self._stage is None:
                    self._read_ahead.again(slot)
                else:
                    self._stage.done(slot)
            except BaseException:
                self._state = "failed"
                raise
        self._next = (index + 1) % len(self._blobs)
        if self._next == 0:
            self._stats.num_passes += 1
            if self._stage is not None:
                self._stage.settle()  # the pass's last result is known: so are its waits

    @property
    def slot_states(self) -> tuple[SlotState, ...]:
        """The host slots as they are now; between passes none is `in_use`, after `close` all are `free`."""
        return self._ring.states

    @property
    def is_idle(self) -> bool:
        """True between passes: no unit is held and the next one is the first."""
        return self._slot is None and self._next == 0

    def snapshot(self) -> StreamSnapshot:
        """Figures since this streamer was made."""
        self._stats.num_read_retries = self._reader.num_retries
        return self._stats.snapshot()

    def close(self) -> None:
        """Cancel reads, wait for those under way and let all memory go; views handed out must not be used after it.

        Idempotent, and safe after an error.

        Raises:
            StoreError: reads are still under way after 5 s; their memory stays with the reader until it lets go.
        """
        if self._state == "closed":
            return
        self._state = "closed"
        timeout_s = min(self._timeout_s, CLOSE_TIMEOUT_S)
        over = self._loader is None or self._loader.close(timeout_s)
        over = self._read_ahead.close(timeout_s) and over
        if self._stage is not None:
            self._stage.close()
        else:  # loading failed: pinned buffers are there all the same
            self._copy.close()
        self._views.clear()
        self._prefixes.clear()
        self._slot = None
        if not over:
            raise StoreError(
                f"reads from {self._directory} are still under way {timeout_s:g} s after they were cancelled: "
                "the disk hangs (see dmesg). End this process"
            )
        self._ring.reset()

    def _expect(self, state: str) -> None:
        if self._state != state:
            raise RuntimeError(f"the streamer is {self._state}, this call needs it {state}")

    def _validate(self, num_slots: int) -> None:
        """Wrong arguments are errors of the planner, not of people."""
        if not self._blobs or len(self._blobs) != len(self._tiers):
            raise ValueError(f"{len(self._blobs)} units, {len(self._tiers)} tiers")
        if len(self._kept) != len(self._blobs):
            raise ValueError(f"{len(self._blobs)} units, {len(self._kept)} kept parts")
        for blob, tier, kept in zip(self._blobs, self._tiers, self._kept, strict=True):
            kept.check(blob)
            if kept.kept_bytes and (tier != "nvme" or not self._copy.in_place):
                raise ValueError(f"{blob.unit}: a part is kept of units that stream from disk to a CPU, not on {tier}")
        if "rows" in self._tiers and not self._copy.in_place:
            raise ValueError("rows are looked up on disk only where the computation takes place in host memory")
        unknown = set(self._tiers) - {"device", "host", "nvme", "rows"}
        if unknown:
            raise ValueError(f"unknown tiers {sorted(unknown)}")
        if self._from_disk and num_slots < 1:
            raise ValueError(f"{len(self._from_disk)} units are streamed from disk, with {num_slots} slots")
        if not self._copy.in_place and len(self._resident) < len(self._blobs) and self._num_device_slots < 1:
            raise ValueError(f"units are streamed to the device, with {self._num_device_slots} device slots")
