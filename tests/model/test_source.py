"""What is packed is what the checkpoint holds: bit for bit, whoever stored it and however it is cut."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_model import SMOLLM2
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dist_infer.location import resolve_model
from dist_infer.model.source import CheckpointSource
from dist_infer.model.stored import stored_encodings
from offload.encoded import EncodedTensor
from offload.quantize import encode
from partition.checkpoint import check_tensors, open_checkpoint
from partition.encoding import EncodingChoice
from partition.errors import CheckpointError, UnsupportedModelError
from partition.model_spec import ModelSpec
from partition.sharding import cut_axes, shard_intervals, units_of

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def source_of(path: Path, tensor: int = 1, dtype: torch.dtype = torch.float32) -> tuple[CheckpointSource, ModelSpec]:
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    return CheckpointSource(index=index, spec=spec, tensor=tensor, tp_ranks=range(tensor), dtype=dtype), spec


def put_together(source: CheckpointSource, spec: ModelSpec, tensor: int) -> dict[str, torch.Tensor]:
    """Whole parameters from the shards of all ranks; parts that several ranks hold must be equal."""
    cut, whole = cut_axes(spec, tensor), {}
    for unit in units_of(spec):
        shards = source.load_unit(unit.name)
        assert len(shards) == tensor
        for parameter in unit.parameters:
            parts = [shard[parameter.name] for shard in shards]
            if parameter.split is None:
                whole[parameter.name] = sum(parts[1:], start=parts[0]) if parameter.once else parts[0]
                assert parameter.once or all(torch.equal(part, parts[0]) for part in parts)
                continue
            dim = parameter.split.dim
            full = torch.full(parameter.shape, torch.nan, dtype=parts[0].dtype)
            for rank, part in enumerate(parts):
                at = 0
                for first, end in shard_intervals(parameter, cut, rank):
                    place, piece = full.narrow(dim, first, end - first), part.narrow(dim, at, end - first)
                    assert bool((place.isnan() | (place == piece)).all()), f"ranks disagree about {parameter.name}"
                    place.copy_(piece)
                    at += end - first
                assert at == part.shape[dim]
            whole[parameter.name] = full
    return whole


def copy_of(path: Path, to: Path) -> Path:
    shutil.copytree(path, to)
    return to


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the checkpoint's one file of tensors."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_shards_put_together_are_the_checkpoint(
    model_type: str, tensor: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Uneven KV groups (llama: 3 for 2 ranks), replicated ones (2 for 3 ranks), packed experts, tied heads."""
    path = tiny_checkpoint(model_type)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    source, spec = source_of(path, tensor)
    found = put_together(source, spec, tensor)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert torch.equal(values, expected[name]), name


def test_a_bias_that_is_summed_lies_on_one_rank_only(tiny_checkpoint: Callable[..., Path]) -> None:
    """Two ranks that both add it would add it twice."""
    source, spec = source_of(tiny_checkpoint("llama", attention_bias=True, mlp_bias=True), 2)
    stored = load_file(tiny_checkpoint("llama", attention_bias=True, mlp_bias=True) / "model.safetensors")
    first, second = source.load_unit("layers.2")
    for name in ("model.layers.2.self_attn.o_proj.bias", "model.layers.2.mlp.down_proj.bias"):
        assert torch.equal(first[name], stored[name])
        assert float(second[name].abs().max()) == 0
    name = "model.layers.2.self_attn.q_proj.bias"
    assert torch.equal(torch.cat([first[name], second[name]]), stored[name])
    assert put_together(source, spec, 2).keys() == stored.keys()


def test_ranks_hold_consecutive_whole_heads(tiny_checkpoint: Callable[..., Path]) -> None:
    """Without the tables of partition: 9 heads of 8 in 3 groups give 6 and 3 heads, and matching columns of o_proj."""
    path = tiny_checkpoint("llama")
    stored = load_file(path / "model.safetensors")
    source, _ = source_of(path, 2)
    first, second = source.load_unit("layers.1")
    for leaf, dim, size in (("q_proj", 0, 48), ("k_proj", 0, 16), ("v_proj", 0, 16), ("o_proj", 1, 48)):
        name = f"model.layers.1.self_attn.{leaf}.weight"
        whole = stored[name]
        assert torch.equal(first[name], whole.narrow(dim, 0, size))
        assert torch.equal(second[name], whole.narrow(dim, size, whole.shape[dim] - size))


def test_a_sharded_checkpoint_gives_the_same_tensors(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Each expert of mixtral is a tensor of its own on disk: here the ones of a layer even lie in different files."""
    path = tiny_checkpoint("mixtral")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    single, spec = source_of(path)
    several, _ = source_of(tmp_path)
    for unit in units_of(spec):
        for a, b in zip(single.load_unit(unit.name), several.load_unit(unit.name), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_packing_draws_no_bars_of_the_library(
    tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """One for each unit would run across our own."""
    source, _ = source_of(tiny_checkpoint("llama"))
    capfd.readouterr()
    source.load_unit("layers.0")
    assert capfd.readouterr() == ("", "")


def test_a_type_is_converted_once(tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint("llama")
    stored = load_file(path / "model.safetensors")
    source, spec = source_of(path, dtype=torch.bfloat16)
    for name, values in put_together(source, spec, 1).items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, stored[name].bfloat16()), name


@pytest.mark.parametrize("wished", ["int8", "int4", "fp8"])
def test_a_rank_s_part_is_encoded_after_the_cut(wished: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Scales of rows that another rank's columns had a say in would make the store depend on the tensor degree."""
    index = open_checkpoint(tiny_checkpoint("qwen3_moe", num_hidden_layers=1))
    spec = ModelSpec.from_config(index.config)
    plain, kept = (
        CheckpointSource(
            index=index, spec=spec, tensor=2, tp_ranks=[1], dtype=torch.bfloat16, encodings=EncodingChoice(wished=name)
        )
        for name in ("float", wished)
    )
    encodings = set()
    for unit in units_of(spec):
        (floats,), (found,) = plain.load_unit(unit.name), kept.load_unit(unit.name)
        assert found.keys() == floats.keys()
        for name, tensor in found.items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensor, floats[name])
                assert unit.name != "layers.0" or "norm" in name or "gate.weight" in name or "down_proj" in name, name
                continue
            expected = encode(floats[name], tensor.encoding, torch.bfloat16)
            assert (tensor.dtype, tensor.shape) == (torch.bfloat16, floats[name].shape)
            assert torch.equal(tensor.codes, expected.codes)
            assert torch.equal(tensor.scales, expected.scales)
            encodings.add(tensor.encoding)
    assert encodings == {"int8": {"int8"}, "int4": {"int4-g64", "int4-g32"}, "fp8": {"fp8-g64", "fp8-g32"}}[wished]


def test_as_is_of_floats_is_floats(tiny_checkpoint: Callable[..., Path]) -> None:
    index = open_checkpoint(tiny_checkpoint("llama"))
    spec = ModelSpec.from_config(index.config)
    source = CheckpointSource(
        index=index,
        spec=spec,
        tensor=1,
        tp_ranks=[0],
        dtype=torch.float32,
        encodings=EncodingChoice(wished="as-is", stored=stored_encodings(index, spec)),
    )
    assert not any(isinstance(t, EncodedTensor) for u in units_of(spec) for t in source.load_unit(u.name)[0].values())


@pytest.mark.slow
def test_gguf_tensors_equal_the_library_s_own() -> None:
    """Rotary row order of q and k, norms, quantized blocks dequantised in pieces, the tied head."""
    from transformers import GgufConfig

    path = resolve_model(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    expected = model.state_dict()
    for tensor in (1, 2):
        source, spec = source_of(path, tensor)
        found = put_together(source, spec, tensor)
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert torch.equal(values, expected[name]), name


# ---- what is wrong is named


def test_a_tensor_of_wrong_shape_is_named(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """By the check of the headers, and again by the source: it must not rely on having been asked."""
    path = copy_of(tiny_checkpoint("llama"), tmp_path / "m")
    change(path, lambda tensors: tensors.update({Q_PROJ: torch.zeros(72, 71)}))
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}.*\[72, 71\].*\[72, 72\]"):
        check_tensors(spec, index)
    source, _ = source_of(path)
    with pytest.raises(CheckpointError, match=Q_PROJ):
        source.load_unit(_unit_of(spec, Q_PROJ))


def test_a_missing_tensor_is_named(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = copy_of(tiny_checkpoint("llama"), tmp_path / "m")
    change(path, lambda tensors: tensors.pop(Q_PROJ))
    index = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=Q_PROJ):
        check_tensors(ModelSpec.from_config(index.config), index)
    with pytest.raises(CheckpointError, match=Q_PROJ):
        source_of(path)


def test_a_missing_head_is_noticed_unless_tied(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Else the embedding would silently stand in for it."""
    path = copy_of(tiny_checkpoint("llama", tie_word_embeddings=False), tmp_path / "m")
    change(path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        source_of(path)


def test_a_file_that_is_cut_after_it_was_opened_is_noticed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """No byte that was not read may become a weight."""
    path = copy_of(tiny_checkpoint("llama"), tmp_path / "m")
    source, spec = source_of(path)
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match=r"ended inside tensor .*bytes expected"):
        put_together(source, spec, 1)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"cannot read tensor .* from {file}"):
        source.load_unit("embed")


def test_quantized_types_are_refused_by_name(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = copy_of(tiny_checkpoint("llama"), tmp_path / "m")
    change(path, lambda tensors: tensors.update({Q_PROJ: torch.zeros(72, 72, dtype=torch.int8)}))
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    with pytest.raises(UnsupportedModelError, match=Q_PROJ):
        check_tensors(spec, index)
    source, _ = source_of(path)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} is stored as I8"):
        source.load_unit(_unit_of(spec, Q_PROJ))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_no_number_is_named_when_it_is_encoded(
    value: float, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As a float it stays what the checkpoint says; as a code it would be some number."""
    path = copy_of(tiny_checkpoint("qwen3"), tmp_path / "m")
    name = "model.layers.1.mlp.up_proj.weight"
    change(path, lambda tensors: tensors[name][5].fill_(value))
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    source = CheckpointSource(
        index=index,
        spec=spec,
        tensor=1,
        tp_ranks=[0],
        dtype=torch.float32,
        encodings=EncodingChoice(wished="int8"),
    )
    with pytest.raises(CheckpointError, match=rf"{name} of {path} \(model\.safetensors\).*{value} at row 5"):
        source.load_unit("layers.1")


def test_a_config_that_says_otherwise_than_the_tables_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A parameter that the partition tables do not know would stay behind uncut."""
    path = copy_of(tiny_checkpoint("llama"), tmp_path / "m")
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    changed = open_checkpoint(path)
    with pytest.raises(UnsupportedModelError, match="bias"):
        CheckpointSource(index=changed, spec=spec, tensor=1, tp_ranks=[0], dtype=torch.float32)


def _unit_of(spec: ModelSpec, parameter: str) -> str:
    return next(unit.name for unit in units_of(spec) if any(p.name == parameter for p in unit.parameters))
