"""An encoded tensor where torch and modules expect a weight."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from offload.encoded import EncodedTensor
from offload.quantize import encode

ENCODINGS = ("int8", "int8-g32", "int4-g32", "int4-g64", "fp8-g128")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Against the float32 product of the decoded weights; both may round weights and result to bfloat16."""
    want = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    size = functional.linear(x.float().abs(), weight.float().abs()).max()
    assert got.shape == want.shape
    assert (got.float() - want).abs().max() <= 2**-8 * want.abs().max() + 2**-10 * size


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 128), (1, 1, 128), (1, 20, 128), (2, 3, 128), (0, 128)])
def test_linear_in_a_module(encoding: str, with_bias: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Guards the protocol: torch must ask an object in `_parameters`, for every shape of x that torch takes."""
    layer = torch.nn.Linear(128, 37, bias=with_bias, dtype=dtype)
    weight = encode(layer.weight.detach(), encoding, dtype)
    layer._parameters["weight"] = weight  # type: ignore[assignment]
    x = random(*shape, dtype=dtype)
    with torch.inference_mode():
        got = layer(x)
    assert got.dtype == dtype
    if x.numel():
        close(got, x, weight.decode(torch.float32), layer.bias)
    else:
        assert got.shape == (0, 37)


@pytest.mark.parametrize("rows", [2, 20])
def test_linear_of_x_that_is_not_contiguous(rows: int) -> None:
    """Guards the kernels against strides that they do not know."""
    weight = encode(random(32, 64), "int4-g32", torch.bfloat16)
    x = random(64, 2 * rows).t()[::2]
    assert not x.is_contiguous()
    with torch.inference_mode():
        assert torch.equal(functional.linear(x, weight), functional.linear(x.contiguous(), weight))  # type: ignore[arg-type]


def test_linear_with_named_arguments() -> None:
    """Guards against a call style that falls back to decoding, or loses the bias."""
    weight, x, bias = encode(random(16, 64), "int8", torch.bfloat16), random(2, 64), random(16)
    with torch.inference_mode():
        want = functional.linear(x, weight, bias)  # type: ignore[arg-type]
        assert torch.equal(functional.linear(input=x, weight=weight, bias=bias), want)  # type: ignore[arg-type]


def test_other_functions_see_the_decoded_tensor() -> None:
    """Guards functions that are not linear, lists of tensors among their arguments."""
    first, second = (encode(random(16, 64, seed=seed), "int4-g32", torch.bfloat16) for seed in (1, 2))
    x = random(3, 64)
    assert torch.equal(torch.cat([first, second]), torch.cat([first.decode(), second.decode()]))  # type: ignore[list-item]
    assert torch.equal(torch.matmul(x, torch.t(first)), x @ first.decode().t())  # type: ignore[arg-type]
    assert torch.equal(
        functional.linear(x, first.decode(), first.decode()[:, 0]),
        functional.linear(x, first.decode(), first.decode()[:, 0]),
    )


def test_what_codes_cannot_answer_is_asked_of_the_decoded_tensor() -> None:
    """Guards model code that multiplies with `weight.T` (falcon): it must get numbers, not an error, and no more."""
    weight = encode(random(16, 64), "int8", torch.bfloat16)
    assert torch.equal(weight.T, weight.decode().T)
    assert torch.equal(weight.view(32, 32), weight.decode().view(32, 32))
    with pytest.raises(AttributeError, match="grad"):  # must not cost a decoded matrix
        _ = weight.grad


def test_gradients_flow_through_x() -> None:
    """Guards against a kernel's result that silently has no gradient."""
    weight = encode(random(16, 64), "int8", torch.bfloat16)
    x = random(2, 64).requires_grad_()
    functional.linear(x, weight).sum().backward()  # type: ignore[arg-type]
    assert x.grad is not None
    assert torch.equal(x.grad[0], weight.decode().sum(0).to(torch.bfloat16))


@pytest.mark.parametrize("rows", [2, 20])
def test_width_that_does_not_fit_is_an_error(rows: int) -> None:
    """Guards against a read beyond x."""
    weight = encode(random(16, 64), "int8", torch.bfloat16)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        functional.linear(random(rows, 32), weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_expert_is_a_view(encoding: str) -> None:
    """Guards packed experts: no copy, and the right tiles, for any way of naming one."""
    packed = encode(random(4, 32, 128), encoding, torch.bfloat16)
    for index in (2, -2, torch.tensor(2)):
        expert = packed[index]
        assert isinstance(expert, EncodedTensor)
        assert expert.codes.data_ptr() == packed.codes.data_ptr() + 4 * packed.codes[0].nbytes
        assert expert.shape == (32, 128)
        assert torch.equal(expert.decode(), packed.decode()[2])
    for index in (4, -5):
        with pytest.raises(IndexError, match="of 4"):
            packed[index]


def test_other_indices_decode() -> None:
    """Guards experts whose rows are not whole tiles, lists of experts, and rows of a matrix."""
    uneven = encode(random(3, 20, 64), "int4-g32", torch.bfloat16)
    assert torch.equal(uneven[1], uneven.decode()[1])  # type: ignore[arg-type]
    packed = encode(random(3, 32, 64), "int4-g32", torch.bfloat16)
    which = torch.tensor([2, 0, 2])
    assert torch.equal(packed[which], packed.decode()[which])  # type: ignore[arg-type]
    matrix = encode(random(20, 64), "int8", torch.bfloat16)
    assert torch.equal(matrix[3:5], matrix.decode()[3:5])  # type: ignore[arg-type]


def test_facts_of_the_tensor_it_stands_for() -> None:
    """Guards the attributes that modules and stores ask for."""
    packed = encode(random(2, 32, 64), "int4-g32", torch.bfloat16)
    assert (packed.ndim, packed.dim(), packed.size(), packed.size(-1), packed.numel()) == (3, 3, (2, 32, 64), 64, 4096)
    assert (packed.device.type, packed.requires_grad, packed.nbytes) == ("cpu", False, 4096 // 2 + 128 * 4)


def test_refuses_arrays_of_another_shape_or_type() -> None:
    """Guards the kernels, which trust the sizes: a wrong slice of a slot would be read beyond its end."""
    good = encode(random(32, 64), "int4-g32", torch.bfloat16)
    for codes, scales in (
        (good.codes[:1], good.scales),
        (good.codes, good.scales.float()),
        (good.codes.view(torch.int8), good.scales),
        (good.codes.transpose(0, 1).contiguous().transpose(0, 1), good.scales),
    ):
        with pytest.raises(ValueError, match="of int4-g32"):
            EncodedTensor(encoding="int4-g32", shape=good.shape, dtype=torch.bfloat16, codes=codes, scales=scales)
