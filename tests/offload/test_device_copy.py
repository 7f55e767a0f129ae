"""What of the way to a GPU is not the driver's: page-locked memory, and the waits that only the device sees."""

from __future__ import annotations

import gc
import weakref

import pytest

from offload.device_copy import CpuCopy, PinnedPages
from offload.device_stage import DeviceStage
from offload.format import BlobEntry
from offload.slots import SlotRing
from offload.stats import StreamStats
from partition.errors import BudgetError


class Driver:
    """Locks pages as a driver does: whole ones, each once, and not more than it may."""

    def __init__(self, limit=1 << 62):
        self.limit = limit
        self.locked = {}

    def lock(self, address, num_bytes):
        assert address % 4096 == num_bytes % 4096 == 0
        assert address not in self.locked
        if sum(self.locked.values()) + num_bytes > self.limit:
            raise RuntimeError("out of memory")
        self.locked[address] = num_bytes

    def unlock(self, address):
        del self.locked[address]


def test_pinned_memory_is_locked_to_the_page_and_not_to_a_power_of_two():
    driver = Driver()
    pages = PinnedPages(driver.lock, driver.unlock)
    buffer = pages.buffer(5 * 4096)
    odd = pages.buffer(4097)
    assert sorted(driver.locked.values()) == [2 * 4096, 5 * 4096]
    assert buffer.tensor.data_ptr() in driver.locked
    assert odd.tensor.numel() == odd.memory.nbytes == 4097
    buffer.memory[:] = b"\x07" * buffer.memory.nbytes
    assert (buffer.tensor == 7).all()


def test_a_buffer_of_nothing_is_not_locked():
    driver = Driver()
    assert PinnedPages(driver.lock, driver.unlock).buffer(0).tensor.numel() == 0
    assert not driver.locked


def test_locked_pages_outlive_their_views_and_are_unlocked_once():
    """Pages unmapped while the driver has them locked would be a stale lock on whatever is mapped there next."""
    driver = Driver()
    pages = PinnedPages(driver.lock, driver.unlock)
    buffer = pages.buffer(4096)
    mapping = weakref.ref(buffer.memory.obj)
    del buffer
    gc.collect()
    assert mapping() is not None
    pages.release()
    assert not driver.locked
    gc.collect()
    assert mapping() is None
    pages.release()


def test_memory_that_cannot_be_locked_is_an_error_with_have_and_need():
    driver = Driver(limit=4 * 4096)
    pages = PinnedPages(driver.lock, driver.unlock)
    pages.buffer(3 * 4096)
    with pytest.raises(BudgetError, match=r"8.00 KiB.*12.00 KiB.*out of memory.*offload\.host_memory"):
        pages.buffer(2 * 4096)
    pages.release()
    assert not driver.locked


class SlowLink(CpuCopy):
    """A device whose waits are known only when the driver says so."""

    in_place = False

    def __init__(self):
        self.known = []

    def waits(self):
        found, self.known = self.known, []
        return found


def test_waits_that_only_the_device_sees_are_counted_for_the_units_they_belong_to():
    """The host enqueues a whole pass ahead of the device: what compute waits for the link is known later."""
    blobs = [
        BlobEntry(unit=f"layers.{n}", tp_rank=0, file=f"{n}.bin", length=4096, digest="", tensors=()) for n in range(3)
    ]
    link, stats = SlowLink(), StreamStats()
    ring = SlotRing(0, 0, link)
    stage = DeviceStage(
        blobs=blobs,
        order=[0, 2],
        host={0: link.host_buffer(4096).tensor, 2: link.host_buffer(4096).tensor},
        ring=ring,
        read_ahead=None,
        copy=link,
        num_slots=2,
        stats=stats,
    )
    for index in (0, 2):
        stage.done(stage.next(index))
    assert stats.snapshot().stall_s == 0
    link.known = [0.25]
    stage.settle()
    assert stats.snapshot().stall_s_per_unit == {"layers.0": 0.25}
    stage.done(stage.next(0))
    link.known = [0.5, 0.125]
    stage.settle()
    assert stats.snapshot().stall_s_per_unit == {"layers.0": 0.375, "layers.2": 0.5}
    stage.close()
