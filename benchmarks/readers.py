"""Which reader, with how many threads and which block size, reads a file fastest, and what it costs the processor.

Run: python benchmarks/readers.py [--directory DIR] [--gib 2] [--rounds 7] [--compute 2] [--json FILE]

Makes a file of random bytes in DIR (a temporary one by default), reads it with every setting in turn, several rounds in
random order, and removes it. Ratios are medians of the ratios within a round, to the first setting. `--compute N`:
beside a process that multiplies matrices on N threads; what is left to it is in the table. Other work on the machine
shows in all of it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import random
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from offload.readers.aio import AioReader
from offload.readers.deepspeed import DeepSpeedReader
from offload.readers.measure import ReadMeasure
from offload.readers.port import Reader
from offload.readers.threads import ThreadReader
from partition.errors import ConfigError

MIB = 2**20
KIB = 2**10

COMPUTE = """
import mmap, struct, sys, torch
torch.set_num_threads(int(sys.argv[2]))
with open(sys.argv[1], "r+b") as file:
    count = mmap.mmap(file.fileno(), 8)
weights = [torch.randn(4096, 4096).bfloat16() for _ in range(6)]
row = torch.randn(1, 4096).bfloat16()
number = 0
while True:
    for weight in weights:
        torch.nn.functional.linear(row, weight)
        number += 1
        struct.pack_into("<Q", count, 0, number)
        if number == 1:
            print("running", flush=True)
"""


def threads(num_threads: int, block_kib: int) -> tuple[str, Callable[[], Reader]]:
    """A case of `threads`."""
    return f"threads {num_threads} x {block_kib} KiB", lambda: ThreadReader(num_threads, block_kib * KIB)


def aio(depth: int, block_kib: int) -> tuple[str, Callable[[], Reader]]:
    """A case of `aio`."""
    return f"aio depth {depth} x {block_kib} KiB", lambda: AioReader(depth, block_kib * KIB)


def deepspeed(num_threads: int, block_kib: int, io_kib: int) -> tuple[str, Callable[[], Reader]]:
    """A case of `deepspeed`."""
    name = f"deepspeed {num_threads} x {block_kib} KiB in {io_kib}"
    return name, lambda: DeepSpeedReader(num_threads, block_kib * KIB, io_kib * KIB)


CASES = (
    *(threads(*case) for case in ((4, 4096), (1, 4096), (2, 4096), (8, 4096), (2, 16384), (8, 2048))),
    *(threads(*case) for case in ((4, 1024), (8, 1024), (12, 1024), (16, 1024), (16, 512))),
    *(aio(*case) for case in ((4, 4096), (8, 4096), (16, 2048), (16, 1024), (32, 1024), (32, 512), (64, 256))),
    *(deepspeed(*case) for case in ((2, 4096, 1024), (4, 4096, 1024), (4, 8192, 512))),
)


class Computing:
    """A process that multiplies; how often, so far."""

    def __init__(self, num_threads: int, directory: Path) -> None:
        counter = directory / "count"
        counter.write_bytes(bytes(8))
        with open(counter, "r+b") as file:
            self._count = mmap.mmap(file.fileno(), 8)
        command = [sys.executable, "-c", COMPUTE, str(counter), str(num_threads)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)

    @property
    def number(self) -> int:
        return int(struct.unpack_from("<Q", self._count)[0])

    def wait_until_it_runs(self) -> None:
        """Imports of its own should not be measured. Raises RuntimeError when it ends instead."""
        if self._process.stdout is None or not self._process.stdout.readline():
            raise RuntimeError("the computing process ended")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)


@contextmanager
def random_file(directory: Path | None, num_bytes: int) -> Iterator[Path]:
    """A file of random bytes, removed at the end."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="readers-") as folder:
        path = Path(folder) / "data"
        with open(path, "wb") as file:
            for start in range(0, num_bytes, 64 * MIB):
                file.write(os.urandom(min(64 * MIB, num_bytes - start)))
            os.fsync(file.fileno())
        yield path


def measured(
    path: Path, num_rounds: int, seconds: float, computing: Computing | None, only: str
) -> tuple[dict[str, list[tuple[float, float, float]]], list[str]]:
    """By case and round: bytes/s, CPU seconds per GB, multiplications/s; and the cases that cannot be had here."""
    missing: list[str] = []
    with ExitStack() as stack:
        readers: dict[str, Reader] = {}
        for name, make in CASES:
            if only not in name:
                continue
            try:
                readers[name] = make()
            except ConfigError as error:
                missing.append(f"{name}: {error}")
                continue
            stack.callback(readers[name].close)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in readers}
        measure = ReadMeasure(path)
        for _ in range(num_rounds):
            for name in random.sample(list(readers), len(readers)):
                before = computing.number if computing else 0
                rate = measure.run(readers[name], seconds)
                done = (computing.number if computing else 0) - before
                found[name].append((rate.bytes_per_s, rate.cpu_s_per_gb, done / rate.seconds))
    return found, missing


def summary(found: dict[str, list[tuple[float, float, float]]]) -> list[dict[str, float | str]]:
    """One row per case: medians, and medians of the ratios to the first case of the same round."""
    base = next(iter(found.values()))

    def ratio(rounds: Sequence[tuple[float, float, float]], column: int) -> float:
        return statistics.median(
            each[column] / of[column] if of[column] else 0.0 for each, of in zip(rounds, base, strict=True)
        )

    return [
        {
            "case": name,
            "gb_per_s": statistics.median(each[0] for each in rounds) / 1e9,
            "ratio": ratio(rounds, 0),
            "cpu_ms_per_gb": 1e3 * statistics.median(each[1] for each in rounds),
            "products_per_s": statistics.median(each[2] for each in rounds),
            "products_ratio": ratio(rounds, 2),
        }
        for name, rounds in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to make the file: on the disk in question")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement")
    parser.add_argument("--compute", type=int, default=0, help="threads of a process that computes meanwhile")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, help="write the figures there, every round of them")
    arguments = parser.parse_args()
    load = [os.getloadavg()[0]]
    with random_file(arguments.directory, int(arguments.gib * 2**30)) as path, ExitStack() as stack:
        computing = None
        if arguments.compute:
            computing = Computing(arguments.compute, path.parent)
            stack.callback(computing.close)
            computing.wait_until_it_runs()
        found, missing = measured(path, arguments.rounds, arguments.seconds, computing, arguments.only)
    load.append(os.getloadavg()[0])
    rows = summary(found)
    facts = f"{platform.platform()}, {os.cpu_count()} cores, load {load[0]:.1f} to {load[1]:.1f}"
    print(f"{facts}, {arguments.rounds} rounds of {arguments.seconds:g} s")
    print(f"{'':32s} {'GB/s':>6s} {'ratio':>6s} {'CPU ms/GB':>10s} {'products/s':>11s} {'ratio':>6s}")
    for row in rows:
        print(
            f"{row['case']:32s} {row['gb_per_s']:6.2f} {row['ratio']:6.3f} {row['cpu_ms_per_gb']:10.1f} "
            f"{row['products_per_s']:11.0f} {row['products_ratio']:6.3f}"
        )
    for line in missing:
        print(line)
    if arguments.json:
        report = {"facts": facts, "seconds": arguments.seconds, "rows": rows, "rounds": found, "missing": missing}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
