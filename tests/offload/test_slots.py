"""The ring's states, and what poison looks like."""

from __future__ import annotations

import pytest
import torch

from offload.aligned import address_of
from offload.device_copy import CpuCopy, copy_for
from offload.slots import SlotRing, SlotState


def test_every_step_is_checked():
    """Reading into a slot that is computed from must be impossible, not unlikely."""
    ring = SlotRing(2, 4096, CpuCopy())
    steps = [ring.begin_read, ring.read_done, ring.take, ring.give_back]
    for number, step in enumerate(steps):
        for other in steps[:number] + steps[number + 1 :]:
            with pytest.raises(RuntimeError, match="slot 0 is"):
                other(0)
        step(0)
    assert ring.states == (SlotState.FREE, SlotState.FREE)
    ring.begin_read(0)
    ring.read_failed(0)
    assert ring.states[0] is SlotState.FREE


def test_slots_are_pages_and_tensor_and_memory_are_the_same_bytes():
    ring = SlotRing(3, 12288, CpuCopy())
    for slot in range(3):
        buffer = ring.buffer(slot)
        assert buffer.tensor.data_ptr() == address_of(buffer.memory)
        assert buffer.tensor.data_ptr() % 4096 == 0
        assert buffer.memory.nbytes == buffer.tensor.numel() == 12288


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_poison_is_nan_in_every_float_type(dtype):
    ring = SlotRing(1, 4096, CpuCopy())
    ring.poison(0)
    assert ring.buffer(0).tensor.view(getattr(torch, dtype)).float().isnan().all()


def test_poison_by_environment(monkeypatch):
    assert not SlotRing(1, 4096, CpuCopy()).poisoned
    monkeypatch.setenv("DIST_INFER_POISON", "1")
    assert SlotRing(1, 4096, CpuCopy()).poisoned


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="cpu and cuda"):
        copy_for("mps", 1, 1)
