"""Floats to codes: how good, how strict, and the same bytes everywhere."""

from __future__ import annotations

import pytest
import torch

from offload.kernels import library
from offload.kernels.layout import pack_codes
from offload.quantize import encode

ENCODINGS = ("int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128", "fp8-g32", "fp8-g64", "fp8-g128")


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def awkward(scale: float) -> torch.Tensor:
    """Groups that are zero, constant, one-sided, nearly constant, both zeros, or far apart in size."""
    w = weights(45, 256) * scale
    w[3] = 0.0
    w[4] = 0.37 * scale
    w[5, :200] = -0.0
    w[6, ::2] = 1e-30
    w[7] = w[7].abs()
    w[8] = 0.5 * scale + w[8] * 1e-6
    w[9, 0] = 100 * scale
    return w


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch operations alone, as on a machine without a compiler."""
    monkeypatch.setenv("DIST_INFER_KERNELS", "off")
    fresh = type(library.loaded)()
    monkeypatch.setattr("offload.quantize.loaded", fresh)
    monkeypatch.setattr("offload.kernels.loaded", fresh)


@pytest.mark.parametrize(
    ("encoding", "most"),
    [
        ("int8", 0.01),
        ("int8-g32", 0.007),
        ("int4-g32", 0.075),
        ("int4-g64", 0.09),
        ("int4-g128", 0.1),
        ("fp8-g128", 0.03),
    ],
)
def test_relative_error_on_a_gaussian(encoding: str, most: float) -> None:
    """Guards against a wrong scale, a shifted code, a lost minimum: each of them is far off."""
    w = weights(64, 256)
    assert (encode(w, encoding, torch.float32).decode() - w).norm() < most * w.norm()


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_kernels_and_torch_write_the_same_bytes(encoding: str, scale: float, request: pytest.FixtureRequest) -> None:
    """Guards the store: one packed with a compiler and one without must be the same."""
    w = awkward(scale)
    first = encode(w, encoding, torch.bfloat16)
    request.getfixturevalue("no_kernels")
    second = encode(w, encoding, torch.bfloat16)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales.view(torch.uint8), second.scales.view(torch.uint8))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_do_not_depend_on_threads_or_pieces(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a result that depends on how the work was cut."""
    w = weights(100, 256)
    threads = torch.get_num_threads()
    first = encode(w, encoding, torch.bfloat16)
    monkeypatch.setattr("offload.quantize._CHUNK_ELEMENTS", 256 * 32)
    torch.set_num_threads(1)
    try:
        second = encode(w, encoding, torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_search_is_never_worse_than_the_range(group: int) -> None:
    """Guards the search: a group's error is at most that of its plain range, and clearly less on average."""
    w = torch.cat([awkward(1.0), weights(64, 256, seed=1)])
    groups = w.view(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale, low = ((high - low) * (1.0 / 15)).half().float(), low.half().float()
    q = ((groups - low) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 15)
    plain = (groups - (q * scale + low)).square().sum(1)
    found = encode(w, f"int4-g{group}", torch.float32).decode().view(-1, group)
    searched = (groups - found).square().sum(1)
    assert (searched <= plain * (1 + 1e-5) + 1e-12).all()
    assert searched.sum() < 0.93 * plain.sum()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_and_constant_groups(encoding: str, dtype: torch.dtype) -> None:
    """Guards against 0 / 0: zeros come back as zeros, constants as themselves to a scale's precision."""
    w = torch.zeros(20, 256, dtype=dtype)
    w[1] = 0.75
    w[2] = -3.0
    back = encode(w, encoding, torch.float32).decode()
    assert torch.equal(back[0], torch.zeros(256))
    torch.testing.assert_close(back, w.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_refuses_inf_and_nan_and_says_where(encoding: str, value: float) -> None:
    """Guards against a silent NaN scale, which would make a whole group NaN."""
    w = weights(40, 128)
    w[37, 5] = value
    with pytest.raises(ValueError, match=f"{value} at row 37, column 5"):
        encode(w, encoding, torch.bfloat16)


@pytest.mark.parametrize(
    ("encoding", "value"), [("int4-g32", 70000.0), ("int8-g32", 8.5e6), ("int8", 1e37), ("fp8-g128", 1e37)]
)
def test_refuses_what_its_scales_cannot_hold(encoding: str, value: float) -> None:
    """Guards against a scale that becomes inf in float16."""
    w = weights(16, 128)
    w[2, 3] = value
    with pytest.raises(ValueError, match=f"too large for {encoding}"):
        encode(w, encoding, torch.bfloat16)


@pytest.mark.parametrize("encoding", ["int8", "fp8-g128"])
def test_large_values_stay_finite(encoding: str) -> None:
    """Guards the largest code: max|w| must not round beyond it."""
    w = weights(16, 128) * 1e30
    back = encode(w, encoding, torch.float32).decode().double()
    assert torch.isfinite(back).all()
    assert (back - w).norm() < 0.03 * w.double().norm()


@pytest.mark.parametrize("shape", [(16, 48), (16,), (4, 96)])
def test_refuses_shapes_that_groups_do_not_divide(shape: tuple[int, ...]) -> None:
    """Guards against a last group that is cut off."""
    with pytest.raises(ValueError, match="int4-g64 cannot hold"):
        encode(torch.zeros(shape), "int4-g64", torch.bfloat16)


def test_layout_is_the_documented_one() -> None:
    """Guards stores on disk: column and row of a code lie where partition.encoding says."""
    columns, row, column = 64, 21, 8 * 5 + 2 * 3 + 1
    codes = torch.zeros(32, columns, dtype=torch.uint8)
    codes[row, column] = 9
    words = pack_codes("int4-g32", codes).view(torch.int16).view(2, columns // 8, 32)
    assert words.nonzero().tolist() == [[1, 5, 2 * 5 + 1]]
    assert words[1, 5, 11].item() & 0xFFFF == 9 << 12
    assert pack_codes("int8-g32", codes).nonzero().tolist() == [[1, column // 4, (2 * 5 + 1) * 2 + 1]]
