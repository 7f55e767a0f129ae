"""Which reader reads the weights: the one the run file names, or the fastest here by a short measurement."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from offload.readers.aio import AioReader
from offload.readers.deepspeed import DeepSpeedReader
from offload.readers.measure import ReadMeasure, ReadRate
from offload.readers.port import Reader
from offload.readers.threads import ThreadReader
from partition.errors import ConfigError, StoreError

ReaderName = Literal["threads", "aio", "deepspeed"]
WantedReader = Literal["auto", "threads", "aio", "deepspeed"]

FASTER = 1.15  # than `threads`, to be taken in its place: beside a computing process it keeps more of its rate

_NUM_ROUNDS = 4
_MAKERS: Mapping[str, Callable[[], Reader]] = {
    "threads": ThreadReader,
    "aio": AioReader,
    "deepspeed": DeepSpeedReader,
}


@dataclass(frozen=True, kw_only=True)
class ReaderChoice:
    """What was chosen and why; `bytes_per_s` of every reader that was measured (none when the run file named one)."""

    name: ReaderName
    bytes_per_s: Mapping[str, float]
    reason: str


def make_reader(name: str) -> Reader:
    """A reader of this name with its usual settings; the caller closes it. Raises ConfigError when it cannot be had."""
    if name not in _MAKERS:
        raise ConfigError(f"no reader is called {name!r}: choose one of auto, {', '.join(_MAKERS)}")
    return _MAKERS[name]()


def choose_reader(wanted: WantedReader, sample: Path, seconds: float = 2.0) -> tuple[Reader, ReaderChoice]:
    """The reader to use, open, and the reason; the caller closes it.

    "auto" reads `sample` (a file on the disk of the store, better larger than 256 MiB) with every reader there is,
    in turn, for `seconds` in all, and takes the fastest if it is 15 % faster than `threads`, which is taken otherwise.

    Raises:
        ConfigError: the reader that was asked for cannot be had here.
        StoreError: "auto", and `sample` cannot be read.
    """
    if wanted != "auto":
        return make_reader(wanted), ReaderChoice(name=wanted, bytes_per_s={}, reason="named in the run file")
    measure = ReadMeasure(sample)
    readers: dict[ReaderName, Reader] = {}
    notes: dict[str, str] = {}
    try:
        for name in get_args(ReaderName):
            try:
                readers[name] = make_reader(name)
            except ConfigError:
                notes[name] = "not available"
        rates = _measured(measure, readers, seconds, notes)
        choice = _choice(rates, notes)
    except BaseException:
        for reader in readers.values():
            reader.close()
        raise
    for name, reader in readers.items():
        if name != choice.name:
            reader.close()
    return readers[choice.name], choice


def _measured(
    measure: ReadMeasure, readers: Mapping[ReaderName, Reader], seconds: float, notes: dict[str, str]
) -> dict[ReaderName, list[ReadRate]]:
    """Rates by reader, measured in turn because disks are noisy. A reader that fails is noted, not the default one."""
    rates: dict[ReaderName, list[ReadRate]] = {name: [] for name in readers}
    slice_s = seconds / (_NUM_ROUNDS * len(readers))
    for _ in range(_NUM_ROUNDS):
        for name in list(rates):
            try:
                rates[name].append(measure.run(readers[name], slice_s))
            except StoreError:
                if name == "threads":
                    raise
                notes[name] = "failed to read"
                del rates[name]
    return rates


def _choice(rates: Mapping[ReaderName, list[ReadRate]], notes: Mapping[str, str]) -> ReaderChoice:
    """The rule, on what was measured."""
    speed = {name: statistics.median(rate.bytes_per_s for rate in found) for name, found in rates.items()}
    cost = {name: statistics.median(rate.cpu_s_per_gb for rate in found) for name, found in rates.items()}
    fastest = max(speed, key=lambda name: speed[name])
    chosen, why = fastest, "the fastest"
    if fastest != "threads" and "threads" in speed and speed[fastest] < FASTER * speed["threads"]:
        chosen, why = "threads", "as fast as any within 15 %"
    figures = [f"{name} {speed[name] / 1e9:.2f} GB/s at {1e3 * cost[name]:.0f} ms of CPU per GB" for name in speed]
    figures += [f"{name} {note}" for name, note in notes.items()]
    return ReaderChoice(
        name=chosen,
        bytes_per_s={str(name): rate for name, rate in speed.items()},
        reason=f"{why}: {', '.join(figures)}",
    )
