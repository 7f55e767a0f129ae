"""Milliseconds of a linear layer from each at-rest encoding, by kernel and rows of x: where the thresholds come from.

Run: python benchmarks/kernels.py [--threads 2] [--shapes 4096x4096,...] [--rows 1,2,...] [--seconds 0.15]

A table for each shape (rows of the matrix x its columns). few, many: the kernels of offload.kernels; decode: the matrix
decoded to bfloat16, then F.linear. torch int4 (groups of 64) and torch int8 are torch's own packed kernels. Several
copies of each matrix take turns, as the layers of a model do. A cell is the median, and the GB of encoded bytes that it
computes from in a second. It wants a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from offload import kernels
from offload.encoded import EncodedTensor
from offload.kernels.library import FEW_ROWS, loaded
from offload.quantize import encode

ENCODINGS = ("int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128", "fp8-g128")
COPIES_BYTES = 64 << 20
MOST_COPIES = 4
TORCH_GROUP = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default="4096x4096,6912x2560,2560x6912")
    parser.add_argument("--rows", default="1,2,3,4,5,6,8,16,32,64,128,512")
    parser.add_argument("--encodings", default=",".join(ENCODINGS))
    parser.add_argument("--seconds", type=float, default=0.15, help="measured for each cell")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counts = [int(count) for count in arguments.rows.split(",")]
    print(f"{kernels.status()}; torch {torch.__version__}, {arguments.threads} threads\n")
    for shape in arguments.shapes.split(","):
        rows, columns = (int(axis) for axis in shape.split("x"))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        print(f"{rows} x {columns}: ms (GB/s)\n\n| | {' | '.join(f'M={count}' for count in counts)} |")
        print("|---|" + "---:|" * len(counts))
        for name, most, nbytes, runs in candidates(weight, arguments.encodings.split(",")):
            cells = []
            for count in counts:
                x = torch.randn(count, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
                ms = median_ms(runs, x, arguments.seconds) if count <= most else None
                cells.append("" if ms is None else f"{ms:.2f} ({nbytes / ms / 1e6:.1f})")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        print()


Runs = list[Callable[[Tensor], object]]


def candidates(weight: Tensor, encodings: list[str]) -> Iterator[tuple[str, int, int, Runs]]:
    """Name, largest M, encoded bytes, and the product from each copy of the matrix."""
    rows, columns = weight.shape
    endless = 1 << 30

    def copies(of: Callable[[], Callable[[Tensor], object]], nbytes: int) -> Runs:
        return [of() for _ in range(max(1, min(MOST_COPIES, COPIES_BYTES // nbytes)))]

    yield "F.linear bf16", endless, weight.nbytes, copies(lambda: partial(times, weight.clone()), weight.nbytes)

    codes = torch.randint(0, 15, (rows, columns), dtype=torch.int32)
    pairs = torch.ones(columns // TORCH_GROUP, rows, 2, dtype=torch.bfloat16)
    nbytes = rows * columns // 2 + pairs.nbytes
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    yield "torch int4", endless, nbytes, copies(lambda: partial(torch_int4, packed.clone(), pairs), nbytes)

    bytes_ = codes.to(torch.int8)
    scales = torch.ones(rows, dtype=torch.bfloat16)
    yield (
        "torch int8",
        endless,
        bytes_.nbytes,
        copies(lambda: partial(torch_int8, bytes_.clone(), scales), bytes_.nbytes),
    )

    library, _ = loaded.get()
    for encoding in encodings:
        first = encode(weight, encoding, torch.bfloat16)
        tensors = [first, *(clone(first) for _ in range(min(MOST_COPIES, COPIES_BYTES // first.nbytes) - 1))]
        yield f"{encoding} decode", endless, first.nbytes, [partial(decoded, tensor) for tensor in tensors]
        if library is not None:
            runs: Runs = [partial(into, library.few_rows, tensor) for tensor in tensors]
            yield f"{encoding} few", FEW_ROWS, first.nbytes, runs
            if library.has_matmul:
                runs = [partial(into, library.many_rows, tensor) for tensor in tensors]
                yield f"{encoding} many", endless, first.nbytes, runs


def times(weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight)


def torch_int4(packed: Tensor, pairs: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, TORCH_GROUP, pairs)  # type: ignore[no-any-return]


def torch_int8(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, codes, scales)  # type: ignore[no-any-return]


def decoded(encoded: EncodedTensor, x: Tensor) -> Tensor:
    return functional.linear(x, encoded.decode())


def into(kernel: Callable[[Tensor, EncodedTensor, None, Tensor], None], encoded: EncodedTensor, x: Tensor) -> None:
    kernel(x, encoded, None, x.new_empty(len(x), encoded.shape[0]))


def clone(encoded: EncodedTensor) -> EncodedTensor:
    return EncodedTensor(
        encoding=encoded.encoding,
        shape=encoded.shape,
        dtype=encoded.dtype,
        codes=encoded.codes.clone(),
        scales=encoded.scales.clone(),
    )


@torch.inference_mode()
def median_ms(runs: Runs, x: Tensor, seconds: float) -> float:
    """At least five rounds after one that warms up."""
    for run in runs:
        run(x)
    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < seconds:
        run = runs[len(taken) % len(runs)]
        started = time.perf_counter()
        run(x)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1e3


if __name__ == "__main__":
    main()
