"""The C kernels: what they compute, on whose threads, and what happens where they cannot be built.

`native` is what this machine's CPU allows, `portable` what any other one gets.
"""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from offload import kernels
from offload.encoded import EncodedTensor
from offload.kernels.build import BuildError, build
from offload.kernels.layout import decode_tiles
from offload.kernels.library import FEW_ROWS, Library, load, loaded
from offload.quantize import encode

X86 = platform.machine() in ("x86_64", "AMD64")
PORTABLE = ("-O1", *(("-mno-avx512f", "-mno-amx-tile", "-mno-amx-bf16") if X86 else ()))
ENCODINGS = ("int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128", "fp8-g32", "fp8-g128")


@pytest.fixture(scope="session")
def portable_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("kernels")
    build(cache, PORTABLE)
    return cache


@pytest.fixture(scope="session", params=["native", "portable"])
def library(request: pytest.FixtureRequest, portable_cache: Path) -> Library:
    if request.param == "portable":
        return load(portable_cache, PORTABLE)
    native, reason = loaded.get()
    assert native is not None, reason
    return native


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def reference(encoded: EncodedTensor) -> torch.Tensor:
    """float32 [N, K] by torch operations alone."""
    values = decode_tiles(encoded.encoding, encoded.shape[-1], encoded.codes, encoded.scales)
    return values[: encoded.shape[0]]


def product(
    library: Library, name: str, x: torch.Tensor, encoded: EncodedTensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What a kernel writes, and that it writes no more: the memory after it keeps its bytes."""
    size = len(x) * encoded.shape[0]
    memory = torch.full((size + 64,), 7.0, dtype=torch.bfloat16)
    getattr(library, name)(x, encoded, bias, memory[:size].view(len(x), -1))
    assert (memory[size:] == 7).all()
    return memory[:size].view(len(x), -1)


def check(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """float32 sums of exact products, rounded once: half a unit of bfloat16, and a little for the order of the sum."""
    want = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = functional.linear(x.double().abs(), weight.double().abs())
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() + 3e-5 * size + 1e-30).all()


@settings(max_examples=60, deadline=None)
@given(
    encoding=st.sampled_from(ENCODINGS),
    rows=st.integers(1, 75),
    groups=st.integers(1, 9),
    num_x=st.integers(1, 40),
    with_bias=st.booleans(),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_products(
    library: Library, encoding: str, rows: int, groups: int, num_x: int, with_bias: bool, offset: float
) -> None:
    """Guards every kernel at every remainder of rows, columns and x; a mean in x shows a wrong offset of the codes."""
    columns = groups * (int(encoding.partition("-g")[2] or 32))
    encoded = encode(random(rows, columns), encoding, torch.bfloat16)
    x, bias = random(num_x, columns, seed=1) + offset, random(rows, seed=2) if with_bias else None
    if num_x <= FEW_ROWS:
        check(product(library, "few_rows", x, encoded, bias), x, reference(encoded), bias)
    if library.has_matmul:
        check(product(library, "many_rows", x, encoded, bias), x, reference(encoded).bfloat16(), bias)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("num_x", [33, 64, 90])
def test_products_of_many_rows(library: Library, encoding: str, num_x: int) -> None:
    """Guards the panels of more than 32 rows: several of them, the last one partly empty."""
    encoded = encode(random(600, 384), encoding, torch.bfloat16)
    x, bias = random(num_x, 384, seed=1), random(600, seed=2)
    if library.has_matmul:
        check(product(library, "many_rows", x, encoded, bias), x, reference(encoded).bfloat16(), bias)
    else:
        assert torch.equal(library.decode(encoded, torch.bfloat16), reference(encoded).bfloat16())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_matmul_sees_the_very_weights_of_decode(library: Library, encoding: str) -> None:
    """Guards AMX's operands: times the unit matrix they are the decoded weights, bit for bit."""
    encoded = encode(random(48, 128), encoding, torch.bfloat16)
    weights = library.decode(encoded, torch.bfloat16)
    assert torch.equal(weights, reference(encoded).bfloat16())
    if library.has_matmul:
        for first in (0, 16, 96):
            for count in (16, 32, 128):
                unit = torch.eye(128, dtype=torch.bfloat16)[first : first + count]
                assert torch.equal(
                    product(library, "many_rows", unit, encoded, None), weights.t()[first : first + count]
                )


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decode_is_the_reference(library: Library, encoding: str, rows: int) -> None:
    """Guards decoding: the bits of the torch operations, in both types, for every code that there is."""
    encoded = encode(random(rows, 256), encoding, torch.bfloat16)
    codes = torch.randint(0, 256, encoded.codes.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    if encoding.startswith("fp8"):
        codes[(codes & 0x7F) == 0x7F] = 0
    encoded.codes.copy_(codes)
    assert torch.equal(library.decode(encoded, torch.float32), reference(encoded))
    assert torch.equal(library.decode(encoded, torch.bfloat16), reference(encoded).bfloat16())


def test_every_e4m3_survives(library: Library) -> None:
    """Guards the smallest fp8 numbers, which bfloat16 instructions would flush if they went through denormals."""
    encoded = encode(random(1, 256), "fp8-g128", torch.bfloat16)
    every = torch.arange(256, dtype=torch.uint8)
    every[(every & 0x7F) == 0x7F] = 0
    lines = encoded.codes.view(64, 16, 2, 2)
    lines[:, 0] = every.view(64, 2, 2).transpose(1, 2)
    encoded.scales.fill_(1.0)
    want = every.view(torch.float8_e4m3fn).float()
    assert torch.equal(library.decode(encoded, torch.float32)[0], want)
    unit = torch.eye(256, dtype=torch.bfloat16)
    for first in range(0, 256, FEW_ROWS):
        got = product(library, "few_rows", unit[first : first + FEW_ROWS], encoded, None)
        assert torch.equal(got[:, 0].float(), want[first : first + FEW_ROWS])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("num_x", [1, 2, 5, 8, 16, 30, 70])
def test_bits_do_not_depend_on_threads(encoding: str, num_x: int) -> None:
    """Guards determinism: every sum belongs to one thread."""
    weight, x = encode(random(200, 256), encoding, torch.bfloat16), random(num_x, 256, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("num_x", [4, 20])
def test_nan_stays_in_its_row(encoding: str, num_x: int) -> None:
    """Guards the other requests of a batch: one row's NaN is that row's alone, and is not hidden there."""
    weight, x = encode(random(40, 128), encoding, torch.bfloat16), random(num_x, 128, seed=1)
    clean = kernels.linear(x, weight)
    x[1, 3] = float("nan")
    got = kernels.linear(x, weight)
    assert got[1].isnan().all()
    others = [row for row in range(num_x) if row != 1]
    assert torch.equal(got[others], clean[others])


def test_more_rows_than_one_scratch_holds() -> None:
    """Guards the cut of long prompts into pieces."""
    weight, x = encode(random(20, 64), "int4-g32", torch.bfloat16), random(1100, 64, seed=1)
    check(kernels.linear(x, weight), x, reference(weight).bfloat16(), None)


def test_torchs_own_matmul_is_not_disturbed() -> None:
    """Guards torch's use of the tile registers between two calls of ours."""
    weight, x, other = encode(random(64, 128), "int8", torch.bfloat16), random(64, 128, seed=1), random(64, 128, seed=2)
    want = functional.linear(x, other)
    first = kernels.linear(x, weight)
    assert torch.equal(functional.linear(x, other), want)
    assert torch.equal(kernels.linear(x, weight), first)


def test_one_openmp_runtime() -> None:
    """Guards against a second libgomp, whose threads would spin against torch's."""
    native, reason = loaded.get()
    assert native is not None, reason
    kernels.linear(random(4, 64), encode(random(32, 64), "int8", torch.bfloat16))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}) == 1


def test_status_names_what_computes() -> None:
    """Guards the line that people are shown."""
    assert kernels.status().startswith("C kernels")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("DIST_INFER_KERNELS", "DIST_INFER_KERNELS=off"), ("PATH", "no C compiler: cc is not on PATH")],
)
def test_without_kernels_torch_computes(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the switch, and machines without a compiler: the reason is told, and the result is right."""
    monkeypatch.setenv(name, "off")
    monkeypatch.setattr("offload.kernels.loaded", type(loaded)())
    assert kernels.status() == f"torch operations ({reason})"
    for encoding in ENCODINGS:
        weight, x = encode(random(40, 128), encoding, torch.bfloat16), random(3, 128, seed=1)
        check(kernels.linear(x, weight), x, reference(weight).bfloat16(), None)


def test_compiler_that_fails_gives_its_reason(tmp_path: Path) -> None:
    """Guards the message: it has the compiler's own words."""
    with pytest.raises(BuildError, match=r"cc failed: .*no-such-flag"):
        build(tmp_path, ("-fno-such-flag-exists", "--no-such-flag"))


def test_cache_that_cannot_be_written_gives_its_reason(tmp_path: Path) -> None:
    """Guards read-only homes."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BuildError, match="cannot write"):
        build(file / "kernels", PORTABLE)


def test_built_once(portable_cache: Path) -> None:
    """Guards the start: a second process takes what the first one built, and nothing else is left behind."""
    (made,) = portable_cache.iterdir()
    before = made.stat()
    assert build(portable_cache, PORTABLE) == made
    assert made.stat().st_mtime_ns == before.st_mtime_ns
    assert list(portable_cache.iterdir()) == [made]


def test_two_builders_at_once(tmp_path: Path) -> None:
    """Guards ranks that start together on a new machine: each gets a complete library, and one file remains."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: load(tmp_path, PORTABLE).path, range(2))
    assert list(tmp_path.iterdir()) == [first]
    assert first == second


def test_damaged_library_is_built_again(portable_cache: Path, tmp_path: Path) -> None:
    """Guards against a file cut short by a full disk or a crash."""
    (made,) = portable_cache.iterdir()
    (tmp_path / made.name).write_bytes(made.read_bytes()[:100])
    assert load(tmp_path, PORTABLE).path == tmp_path / made.name
    assert (tmp_path / made.name).stat().st_size > 1000
