"""GGUF at its own size: every type as floats, as it is, and encoded anew; packed experts; cut over ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import convert

from benchmarks.gguf_loss import blocks_of, one_layer, relative_rms, write_gguf
from dist_infer.model import gguf_source
from dist_infer.model.gguf_blocks import Codes
from dist_infer.model.gguf_tiles import scales_fit, tiles_of
from dist_infer.model.shards import Stored, Wanted, shard_tensor
from dist_infer.model.source import CheckpointSource
from dist_infer.model.stored import stored_encodings
from offload.encoded import EncodedTensor
from offload.kernels.layout import pack_codes, pack_scales
from offload.quantize import encode
from partition.checkpoint import check_tensors, open_checkpoint
from partition.encoding import EncodingChoice
from partition.errors import CheckpointError, UnsupportedModelError
from partition.gguf_types import AS_IS, READABLE_TYPES
from partition.model_spec import ModelSpec
from partition.sharding import AxisCut, ParameterSpec, cut_axes, shard_shape, units_of

EXACT = {"Q4_0", "Q4_1", "Q8_0", "Q5_0", "TQ1_0", "TQ2_0", "IQ4_NL", "MXFP4"}
# what as-is may add to a type's own error: the two that only round their scales, 8 bits anew, 4 bits anew
MOST_LOSS = {"Q4_K": 0.001, "IQ4_XS": 0.001, "int8-g32": 0.01, "int4-g32": 0.06}
MATRICES = {"self_attn.q_proj": ("attn_q", 0, (256, 256)), "mlp.down_proj": ("ffn_down", 6, (256, 512))}


def source_of(
    path: Path, tensor: int = 1, wished: str = "float", dtype: torch.dtype = torch.float32
) -> tuple[CheckpointSource, ModelSpec]:
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    check_tensors(spec, index)
    choice = EncodingChoice(wished=wished, stored=stored_encodings(index, spec) if wished == "as-is" else {})
    source = CheckpointSource(
        index=index, spec=spec, tensor=tensor, tp_ranks=range(tensor), dtype=dtype, encodings=choice
    )
    return source, spec


def one_of(kind: str, path: Path) -> Path:
    """A llama of one layer in a type."""
    return one_layer(path / f"{kind}.gguf", kind)[0]


def dequantised(kind: str, name: str) -> torch.Tensor:
    """By the gguf package, and with q's rows put back as the model class wants them (the tests' own formula)."""
    _, seed, (rows, columns) = MATRICES[name]
    values = gguf.dequantize(blocks_of(kind, rows, columns, seed)[0], gguf.GGMLQuantizationType[kind])
    if name.endswith("q_proj"):
        values = values.reshape(4, 32, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return torch.from_numpy(np.ascontiguousarray(values))


def parameter_of(spec: ModelSpec, unit: str, leaf: str) -> ParameterSpec:
    found = next(unit_spec for unit_spec in units_of(spec) if unit_spec.name == unit)
    return next(p for p in found.parameters if leaf in p.name)


def parts_of(source: CheckpointSource, parameter: ParameterSpec, cut: AxisCut, encoding: str) -> list[Stored]:
    """One parameter for all ranks."""
    wanted = [
        Wanted(tp_rank=rank, encoding=encoding, shape=shard_shape(parameter, cut, rank)) for rank in range(cut.tensor)
    ]
    return source.reader.parts(parameter, cut, wanted)


# ---- every type


@pytest.mark.parametrize("kind", sorted(READABLE_TYPES - {"F64"}))
def test_every_type_is_read_and_cut(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces by several threads, rows put back in order, rows and columns cut: what the gguf package says."""
    monkeypatch.setattr(gguf_source, "_PIECE_ELEMENTS", 16384)
    source, spec = source_of(one_of(kind, tmp_path))
    for name in MATRICES:
        parameter, expected = parameter_of(spec, "layers.0", name), dequantised(kind, name)
        for tensor in (1, 2, 3):
            cut = cut_axes(spec, tensor)
            for rank, found in enumerate(parts_of(source, parameter, cut, "raw")):
                assert isinstance(found, torch.Tensor)
                assert torch.equal(found, shard_tensor(expected, parameter, cut, rank)), name


@pytest.mark.parametrize("kind", sorted(AS_IS))
def test_as_is_keeps_every_type(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit where codes and scales are taken over, also for cuts of rows and of columns; else within the loss."""
    monkeypatch.setattr(gguf_source, "_PIECE_ELEMENTS", 32768)
    source, spec = source_of(one_of(kind, tmp_path), wished="as-is", dtype=torch.bfloat16)
    for name in MATRICES:
        parameter, expected = parameter_of(spec, "layers.0", name), dequantised(kind, name)
        thirds = {**cut_axes(spec, 3).intervals, "mlp": ((0, 192), (192, 352), (352, 512))}  # inside blocks of 256
        for cut in (cut_axes(spec, 1), AxisCut(tensor=3, intervals=thirds)):
            for rank, found in enumerate(parts_of(source, parameter, cut, AS_IS[kind])):
                part = shard_tensor(expected, parameter, cut, rank)
                assert isinstance(found, EncodedTensor)
                assert (found.encoding, found.dtype) == (AS_IS[kind], torch.bfloat16)
                if kind in EXACT:
                    assert torch.equal(found.decode(torch.float32), part), name
                else:
                    limit = MOST_LOSS.get(kind, MOST_LOSS[AS_IS[kind]])
                    assert relative_rms(found.decode(torch.float32), part) < limit, name


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("encoding", ["int4-g32", "int8-g32"])
def test_tiles_are_those_of_the_layout(encoding: str, rows: int) -> None:
    """Two ways to one layout: what the kernels read must not depend on who packed it."""
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, 16 if encoding == "int4-g32" else 256, (rows, 96), dtype=np.uint8)
    scales = rng.standard_normal((rows, 3)).astype(np.float16).astype(np.float32)
    scales[0] = -0.0
    minima = -8 * scales if encoding == "int4-g32" else None
    found = tiles_of(encoding, Codes(codes=codes, scales=scales, minima=minima), torch.bfloat16)
    parts = [pack_scales(torch.from_numpy(part).half() + 0.0) for part in (scales, minima) if part is not None]
    expected = parts[0] if minima is None else torch.stack(parts, 2)
    assert (found.shape, found.dtype) == (torch.Size(codes.shape), torch.bfloat16)
    assert torch.equal(found.codes, pack_codes(encoding, torch.from_numpy(codes)))
    assert torch.equal(found.scales.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("value", [np.nan, np.inf, 7e4])
def test_scales_that_float16_does_not_hold_are_not_taken_over(value: float) -> None:
    """A damaged block's NaN would have been kept as it is, and computed with."""
    codes, scales = np.zeros((2, 64), dtype=np.uint8), np.ones((2, 2), dtype=np.float32)
    assert scales_fit(Codes(codes=codes, scales=scales, minima=-scales))
    for part in (0, 1):
        given = [scales.copy(), -scales]
        given[part][1, 1] = value
        assert not scales_fit(Codes(codes=codes, scales=given[0], minima=given[1]))


@pytest.mark.parametrize("encoding", ["raw", "int8", "int8-g32", "int4-g64", "fp8-g128"])
def test_pieces_make_no_difference(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that ended inside a tile of rows would shift all rows after it."""
    source, spec = source_of(one_of("Q6_K", tmp_path))
    parameter, cut = parameter_of(spec, "layers.0", "self_attn.q_proj"), cut_axes(spec, 1)
    (whole,) = parts_of(source, parameter, cut, encoding)
    monkeypatch.setattr(gguf_source, "_PIECE_ELEMENTS", 20000)  # four tiles and a part of a fifth
    (found,) = parts_of(source, parameter, cut, encoding)
    if isinstance(whole, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, whole)
    else:
        assert isinstance(found, EncodedTensor)
        assert torch.equal(found.codes, whole.codes)
        assert torch.equal(found.scales, whole.scales)


def test_another_encoding_is_made_from_full_floats(tmp_path: Path) -> None:
    """Not from floats that were rounded to the model's dtype before."""
    source, spec = source_of(one_of("Q6_K", tmp_path), 1, "int8", torch.bfloat16)
    name = parameter_of(spec, "layers.0", "down_proj").name
    expected = encode(dequantised("Q6_K", "mlp.down_proj"), "int8", torch.bfloat16)
    found = source.load_unit("layers.0")[0][name]
    assert isinstance(found, EncodedTensor)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


def test_columns_cut_inside_a_group_are_encoded_anew(tmp_path: Path) -> None:
    """Codes of half a group have no scale of their own to go with."""
    source, spec = source_of(one_of("Q4_0", tmp_path), 1, "as-is")
    parameter = parameter_of(spec, "layers.0", "down_proj")
    cut = AxisCut(tensor=2, intervals={"mlp": ((0, 48), (48, 512))})
    first, second = parts_of(source, parameter, cut, "raw")
    expected = dequantised("Q4_0", "mlp.down_proj")
    assert torch.equal(first, expected[:, :48])
    assert torch.equal(second, expected[:, 48:])
    cut = AxisCut(tensor=3, intervals={"mlp": ((0, 16), (16, 272), (272, 512))})
    (encoded,) = source.reader.parts(parameter, cut, [Wanted(tp_rank=1, encoding="int4-g32", shape=(256, 256))])
    assert torch.equal(encoded.codes, encode(expected[:, 16:272], "int4-g32", torch.float32).codes)


# ---- packed experts


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gemma3_text", "qwen3"])
def test_a_gguf_is_the_checkpoint_that_it_was_made_from(
    model_type: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts packed in two tensors, norms stored plus one, rows of q and k reordered: equal on all ranks."""
    changes = {"head_dim": 16} if model_type == "mixtral" else {}
    checkpoint = tiny_checkpoint(model_type, num_hidden_layers=2, **changes)
    converted = convert(checkpoint, tmp_path / "m.gguf")
    for tensor in (1, 2, 3):
        expected, spec = source_of(checkpoint, tensor)
        found, same = source_of(converted, tensor)
        assert (same.layer_kinds, same.dims, same.tied) == (spec.layer_kinds, spec.dims, spec.tied)
        for unit in units_of(spec):
            for ours, theirs in zip(found.load_unit(unit.name), expected.load_unit(unit.name), strict=True):
                assert ours.keys() == theirs.keys()
                for name in ours:
                    close = torch.allclose(ours[name], theirs[name], atol=1e-6)  # gemma's norms went through plus one
                    assert close if "norm" in name else torch.equal(ours[name], theirs[name]), name


def test_experts_of_two_types_are_kept_as_they_are(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Gate in 4 bits and up in 8: both exact in the wider encoding, on every rank."""
    checkpoint = tiny_checkpoint("qwen3_moe", num_hidden_layers=1)
    kinds = {"gate_exps": "Q4_0", "up_exps": "Q8_0", "down_exps": "Q4_1"}
    path = convert(checkpoint, tmp_path / "m.gguf", lambda n: next((k for e, k in kinds.items() if e in n), "BF16"))
    floats, spec = source_of(path, 2)
    (whole,) = source_of(path, 1)[0].load_unit("layers.0")
    source, _ = source_of(path, 2, "as-is")
    for rank, (held, plain) in enumerate(zip(source.load_unit("layers.0"), floats.load_unit("layers.0"), strict=True)):
        gate_up = held["model.layers.0.mlp.experts.gate_up_proj"]
        assert isinstance(gate_up, EncodedTensor)
        assert gate_up.encoding == "int8-g32"
        assert torch.equal(gate_up.decode(), plain["model.layers.0.mlp.experts.gate_up_proj"])
        # 32 columns for two ranks are 16 each, which no group of 32 divides
        down = held["model.layers.0.mlp.experts.down_proj"]
        assert isinstance(down, torch.Tensor)
        assert torch.equal(down, whole["model.layers.0.mlp.experts.down_proj"][..., 16 * rank : 16 * rank + 16])
        assert all(isinstance(t, torch.Tensor) for n, t in held.items() if "experts.gate_up" not in n)
    (single,) = source_of(path, 1, "as-is")[0].load_unit("layers.0")
    down = single["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(down, EncodedTensor)
    assert torch.equal(down.decode(), whole[next(p for p in whole if "down_proj" in p)])
    assert spec.dims["num_experts"] == 4


def test_a_routed_gguf_normalises_its_experts_weights(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The model class would not by default, and the metadata cannot say it."""
    path = convert(tiny_checkpoint("qwen3_moe", num_hidden_layers=1), tmp_path / "m.gguf")
    assert open_checkpoint(path).config["norm_topk_prob"] is True


# ---- what as-is says


def test_stored_encodings(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Plans weigh the store by it: a float that is listed, or a type that is not, would be planned wrongly."""
    kinds = {"attn_q": "Q8_0", "attn_k": "Q4_1", "ffn_up": "F16"}
    checkpoint = tiny_checkpoint("qwen3", num_hidden_layers=1)
    path = convert(checkpoint, tmp_path / "m.gguf", lambda n: next((k for e, k in kinds.items() if e in n), "F32"))
    index = open_checkpoint(path)
    layer = "model.layers.0."
    assert stored_encodings(index, ModelSpec.from_config(index.config)) == {
        f"{layer}self_attn.q_proj.weight": "int8-g32",
        f"{layer}self_attn.k_proj.weight": "int4-g32",
    }
    floats = open_checkpoint(checkpoint)
    assert stored_encodings(floats, ModelSpec.from_config(floats.config)) == {}


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, dist_infer.model.stored; sys.exit('torch' in sys.modules or 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---- what is wrong is named


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "Q1_0", "I8"])
def test_a_type_without_numbers_is_refused_when_the_file_is_opened(kind: str, tmp_path: Path) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = np.zeros((64, 256 // block * size), dtype=np.int8 if kind == "I8" else np.uint8)
    path = write_gguf(tmp_path / "m.gguf", "llama", {}, {"token_embd.weight": (kind, blocks)})
    with pytest.raises(UnsupportedModelError, match=rf"token_embd\.weight.* of type {kind}"):
        open_checkpoint(path)


@pytest.mark.parametrize("wished", ["as-is", "int4", "int8"])
def test_what_is_no_number_is_named(wished: str, tmp_path: Path) -> None:
    """One NaN of a scale would make every token NaN; the codes know nothing of it."""
    path = one_of("Q8_0", tmp_path)
    index = open_checkpoint(path)
    entry = index.tensors["blk.0.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[entry.start + 34 * 100 : entry.start + 34 * 100 + 2] = np.float16("nan").tobytes()
    path.write_bytes(content)
    source, _ = source_of(path, 1, wished)
    with pytest.raises(CheckpointError, match=rf"blk\.0\.ffn_up\.weight of {path}.*nan"):
        source.load_unit("layers.0")


def test_a_missing_half_of_experts_is_named(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = convert(tiny_checkpoint("qwen3_moe", num_hidden_layers=1), tmp_path / "m.gguf")
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    del index.tensors["blk.0.ffn_up_exps.weight"]
    with pytest.raises(CheckpointError, match=r"lacks tensor 'blk\.0\.ffn_up_exps\.weight' of shape \[4, 32, 64\]"):
        check_tensors(spec, index)
    with pytest.raises(CheckpointError, match=r"ffn_up_exps\.weight for model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        CheckpointSource(index=index, spec=spec, tensor=1, tp_ranks=[0], dtype=torch.float32)


def test_a_tensor_that_no_parameter_takes_is_named(tmp_path: Path) -> None:
    """A bias of q that the model class does not have would be left out of every sum."""
    path = one_of("Q8_0", tmp_path)
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    index.tensors["blk.0.attn_output.bias"] = index.tensors["blk.0.attn_norm.weight"]
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_output\.bias' belongs to no parameter"):
        check_tensors(spec, index)
