"""Facts of this machine for the planner: memory, cores, GPUs, and, on demand, measured rates (these need torch)."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import psutil

from offload.machine import cores, measure_read, memory_limit
from offload.readers.choose import WantedReader, choose_reader
from partition.hardware import (
    ASSUMED_CORE_FLOPS,
    ASSUMED_DISK_BYTES_PER_S,
    ASSUMED_MEMORY_BYTES_PER_S,
    DeviceFacts,
    NodeFacts,
)


def machine_facts(
    *, with_devices: bool, sample: Path | None = None, dtype: str | None = None, reader: WantedReader = "threads"
) -> NodeFacts:
    """This machine. with_devices: ask the NVIDIA driver for GPUs.

    sample: a large file on the store's disk, read raw with `reader` for a third of a second to get the disk's rate;
    with "auto" for two seconds, to choose the reader. dtype: time a matrix product in it (about 0.2 s, imports torch).
    What is not measured is a default and named in `assumed`.
    """
    memory = memory_limit()
    num_cores = cores()
    assumed = []
    disk, chosen, reason = ASSUMED_DISK_BYTES_PER_S, "threads", ""
    if sample is not None:
        disk, chosen, reason = _disk_rate(sample, reader)
    else:
        assumed.append("disk_per_s")
    flops, memory_rate = ASSUMED_CORE_FLOPS * num_cores, ASSUMED_MEMORY_BYTES_PER_S
    if dtype is not None:
        flops, memory_rate = _compute_rates(dtype, num_cores)
    else:
        assumed += ["flops", "memory_per_s"]
    devices = nvidia_devices() if with_devices else ()
    if devices:
        assumed += ["devices.link_per_s", "devices.flops", "devices.memory_per_s"]
    return NodeFacts(
        name=socket.gethostname(),
        cores=num_cores,
        memory_bytes=memory.bytes_available + _own_bytes(),
        memory_source=memory.source,
        devices=devices,
        disk_bytes_per_s=disk,
        flops=flops,
        memory_bytes_per_s=memory_rate,
        reader=chosen,
        reader_reason=reason,
        assumed=tuple(assumed),
    )


def _disk_rate(sample: Path, wanted: WantedReader) -> tuple[float, str, str]:
    """(bytes per second, reader, why that one)."""
    reader, choice = choose_reader(wanted, sample)
    try:
        rate = choice.bytes_per_s[choice.name] if choice.bytes_per_s else measure_read(sample, reader=reader)
    finally:
        reader.close()
    return rate, choice.name, choice.reason


def nvidia_devices() -> tuple[DeviceFacts, ...]:
    """GPUs this process may use, with the memory that is free on them now; empty where there is no NVIDIA driver.

    CUDA_VISIBLE_DEVICES is followed where it lists plain numbers, as torch would.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        devices = []
        for index in visible_devices(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            free = pynvml.nvmlDeviceGetMemoryInfo(handle).free
            devices.append(DeviceFacts(name=str(pynvml.nvmlDeviceGetName(handle)), memory_bytes=int(free)))
        return tuple(devices)
    finally:
        pynvml.nvmlShutdown()


def visible_devices(count: int) -> list[int]:
    """Of so many GPUs the numbers of those that this process may use."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(range(count))
    numbers = [part.strip() for part in wanted.split(",") if part.strip()]
    if not all(number.isdigit() for number in numbers):
        return list(range(count)) if numbers and not numbers[0].startswith("-") else []
    return [int(number) for number in numbers if int(number) < count]


def _own_bytes() -> int:
    """What this process holds already: it is gone from what is available, and part of the footprint planned for."""
    info = psutil.Process().memory_info()
    return int(info.rss - info.shared)


def _compute_rates(dtype: str, num_cores: int) -> tuple[float, float]:
    """(FLOP/s of a 256-row product, bytes/s of weights in a one-row product) with all cores; the best of several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_cores)
    try:
        kind = getattr(torch, dtype)
        weight = torch.ones(4096, 2048, dtype=kind)  # more than a core's own caches hold
        seconds = {}
        for rows in (1, 256):
            batch = torch.ones(rows, 2048, dtype=kind)
            times = []
            for _ in range(8):
                started = time.perf_counter()
                torch.nn.functional.linear(batch, weight)
                times.append(time.perf_counter() - started)
            seconds[rows] = min(times)  # of a shared machine the best run says what it can do
        return 2 * 256 * weight.numel() / seconds[256], weight.nbytes / seconds[1]
    finally:
        torch.set_num_threads(before)
