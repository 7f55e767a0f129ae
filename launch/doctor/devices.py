"""GPUs, asked of the NVIDIA driver: what is free on them, whether their memory errs, whether something slows them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_infer.machine import visible_devices
from launch.doctor.finding import Finding, error, ok, warning
from partition.sizes import format_size

_CHECK = "devices"
_TAKEN_SHARE = 0.1
# Reasons for lower clocks that are not part of ordinary work (a power cap under load is).
_SLOWED = {0x08: "hardware slowdown", 0x20: "too hot", 0x40: "too hot (hardware)", 0x80: "external power brake"}


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """One GPU. `ecc_errors`: uncorrected since the driver started; None: it does not count them.

    `rows`: "failed" or "pending" where memory that errs could not, or not yet, be replaced; else empty.
    """

    index: int
    name: str
    free_bytes: int
    total_bytes: int
    ecc_errors: int | None
    rows: str
    slowed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """`driver` is empty where there is no NVIDIA driver, and `problem` says why; `cuda`: the newest that it runs.

    `torch_cuda`: what the installed torch was built for; empty: none.
    """

    driver: str
    cuda: tuple[int, int]
    torch_cuda: str
    devices: tuple[DeviceState, ...]
    problem: str


def read_devices() -> DeviceFacts:
    """Those that this process may use. Does not start CUDA, imports no torch."""
    import pynvml

    torch_cuda = _torch_cuda()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as caught:
        return DeviceFacts(driver="", cuda=(0, 0), torch_cuda=torch_cuda, devices=(), problem=str(caught))
    try:
        version = int(pynvml.nvmlSystemGetCudaDriverVersion())
        indices = visible_devices(pynvml.nvmlDeviceGetCount())
        return DeviceFacts(
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
            cuda=(version // 1000, version % 1000 // 10),
            torch_cuda=torch_cuda,
            devices=tuple(_state(index) for index in indices),
            problem="",
        )
    finally:
        pynvml.nvmlShutdown()


def judge_devices(found: Mapping[str, DeviceFacts], *, here: str) -> list[Finding]:
    """For a run on GPUs. found: by node."""
    findings = []
    for node, facts in found.items():
        findings += _judge_node(node, facts)
        if facts.driver and found[here].driver and facts.driver != found[here].driver:
            findings.append(
                warning(
                    _CHECK,
                    node,
                    f"the NVIDIA driver is {facts.driver} there and {found[here].driver} on {here}",
                    why="NCCL between two drivers is little tested, and their kernels may round differently",
                    do="install the same driver on all nodes",
                )
            )
    return findings


def _judge_node(node: str, facts: DeviceFacts) -> list[Finding]:
    if not facts.driver or not facts.devices:
        return [
            error(
                _CHECK,
                node,
                facts.problem or "the driver shows this process no GPU",
                why="the run is on GPUs (cluster.device)",
                do="install the driver (`nvidia-smi` must list the GPUs), look at CUDA_VISIBLE_DEVICES, or use "
                "cluster.device: cpu",
                kind="config",
            )
        ]
    findings = _judge_torch(node, facts)
    for device in facts.devices:
        findings += _judge_device(node, device)
    if not findings:
        listed = ", ".join(
            f"{device.index}: {device.name}, {format_size(device.free_bytes)} of {format_size(device.total_bytes)} free"
            for device in facts.devices
        )
        cuda = ".".join(map(str, facts.cuda))
        findings.append(ok(_CHECK, node, f"driver {facts.driver} (CUDA {cuda}); {listed}"))
    return findings


def _judge_torch(node: str, facts: DeviceFacts) -> list[Finding]:
    built = [int(part) for part in re.findall(r"\d+", facts.torch_cuda)[:2]]
    if not built:
        return [
            error(
                _CHECK,
                node,
                "the installed torch is built without CUDA",
                why="it cannot compute on the GPUs that are there",
                do="install a CUDA build of the same version of torch, or use cluster.device: cpu",
            )
        ]
    if built[0] > facts.cuda[0]:
        newest = ".".join(map(str, facts.cuda))
        return [
            error(
                _CHECK,
                node,
                f"torch is built for CUDA {facts.torch_cuda}, driver {facts.driver} runs up to {newest}",
                why="the first kernel would fail",
                do="install a newer driver, or a torch built for an older CUDA",
            )
        ]
    return []


def _judge_device(node: str, device: DeviceState) -> list[Finding]:
    findings = []
    which = f"GPU {device.index} ({device.name})"
    taken = device.total_bytes - device.free_bytes
    if taken > _TAKEN_SHARE * device.total_bytes:
        findings.append(
            warning(
                _CHECK,
                node,
                f"{which}: {format_size(taken)} of {format_size(device.total_bytes)} are taken",
                why="the plan gets what is free now; more of the model will be streamed, and what takes the rest may "
                "take more",
                do="end what runs there (`nvidia-smi` lists it), or set offload.device_memory",
            )
        )
    if device.rows == "failed":
        findings.append(
            error(
                _CHECK,
                node,
                f"{which}: memory that errs could not be replaced (row remapping failed)",
                why="weights and KV cache there may change under the computation",
                do="take this GPU out of service",
            )
        )
    elif device.rows == "pending" or device.ecc_errors:
        findings.append(
            warning(
                _CHECK,
                node,
                f"{which}: {device.ecc_errors or 0} uncorrected memory errors (ECC)"
                + ("; rows will be replaced at the next reset" if device.rows else ""),
                why="the next one ends the rank that uses it",
                do="reset the GPU when nothing runs on it (`nvidia-smi --gpu-reset`), and see whether more come",
            )
        )
    if device.slowed:
        findings.append(
            warning(
                _CHECK,
                node,
                f"{which} is slowed down: {', '.join(device.slowed)}",
                why="all ranks wait for the slowest in every layer",
                do="look at its cooling and power supply (`nvidia-smi -q -d PERFORMANCE,TEMPERATURE`)",
            )
        )
    return findings


def _state(index: int) -> DeviceState:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    ecc: int | None = None
    rows, reasons = "", 0
    with suppress(pynvml.NVMLError):  # each of these is missing on some GPUs
        ecc = int(
            pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            )
        )
    with suppress(pynvml.NVMLError):
        _, _, is_pending, has_failed = pynvml.nvmlDeviceGetRemappedRows(handle)
        rows = "failed" if has_failed else "pending" if is_pending else ""
    with suppress(pynvml.NVMLError):
        reasons = int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    return DeviceState(
        index=index,
        name=str(pynvml.nvmlDeviceGetName(handle)),
        free_bytes=int(memory.free),
        total_bytes=int(memory.total),
        ecc_errors=ecc,
        rows=rows,
        slowed=tuple(words for bit, words in _SLOWED.items() if reasons & bit),
    )


def _torch_cuda() -> str:
    """From torch's own file, since importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        with suppress(OSError):
            text = (Path(folder) / "version.py").read_text(encoding="utf-8")
            if match := re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE):
                return match[1]
    return ""
