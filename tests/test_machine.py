"""Facts of the machine the tests run on: plausible, and honest about what was not measured."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest
import torch

from dist_infer.machine import machine_facts, nvidia_devices
from partition.errors import StoreError
from partition.hardware import ASSUMED_DISK_BYTES_PER_S, ASSUMED_MEMORY_BYTES_PER_S


def test_what_is_not_measured_is_named() -> None:
    facts = machine_facts(with_devices=False)
    assert facts.name == socket.gethostname()
    assert 1 <= facts.cores <= len(os.sched_getaffinity(0))
    assert 0 < facts.memory_bytes <= psutil.virtual_memory().total
    assert facts.memory_source
    assert facts.devices == ()
    assert facts.assumed == ("disk_per_s", "flops", "memory_per_s")
    assert facts.disk_bytes_per_s == ASSUMED_DISK_BYTES_PER_S
    assert facts.memory_bytes_per_s == ASSUMED_MEMORY_BYTES_PER_S


def test_a_file_and_a_type_make_everything_measured(tmp_path: Path) -> None:
    """Positive and finite is all that can be asked of any machine; the thread count must be as before."""
    sample = tmp_path / "blob.bin"
    sample.write_bytes(os.urandom(1 << 20))
    threads = torch.get_num_threads()
    facts = machine_facts(with_devices=False, sample=sample, dtype="float32")
    assert facts.assumed == ()
    for rate in (facts.disk_bytes_per_s, facts.flops, facts.memory_bytes_per_s):
        assert 1e3 < rate < 1e18
    assert facts.disk_bytes_per_s != ASSUMED_DISK_BYTES_PER_S
    assert torch.get_num_threads() == threads


def test_only_what_was_measured_counts_as_measured(tmp_path: Path) -> None:
    sample = tmp_path / "blob.bin"
    sample.write_bytes(bytes(1 << 16))
    assert machine_facts(with_devices=False, sample=sample).assumed == ("flops", "memory_per_s")


def test_a_sample_that_cannot_be_read_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be measured"):
        machine_facts(with_devices=False, sample=tmp_path / "absent")


def test_gpus_are_what_the_driver_says_and_none_without_one() -> None:
    devices = nvidia_devices()
    assert all(device.memory_bytes >= 0 and device.name for device in devices)
    assert machine_facts(with_devices=True).devices == devices or devices  # free memory may change between two calls
