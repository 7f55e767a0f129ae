"""GGUF's names and types, as the tables have them, against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from conftest import tiny_config
from gguf_files import ARCHITECTURES, named_tensors

from partition.gguf_config import gguf_architecture
from partition.gguf_names import gguf_sources
from partition.gguf_types import AS_IS, FLOAT_TYPES, READABLE_TYPES, TENSOR_TYPES
from partition.model_spec import ModelSpec
from partition.sharding import units_of


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_names_are_those_of_the_gguf_package(model_type: str) -> None:
    """A name of ours that no converter writes would refuse good files, or compute without a tensor."""
    spec = ModelSpec.from_config(tiny_config(model_type, num_hidden_layers=3).to_dict())
    sources = gguf_sources(spec, set() if spec.tied else {"output.weight"})
    assert sources.keys() == {p.name for unit in units_of(spec) for p in unit.parameters}
    for parameter, names in sources.items():
        written = "model.embed_tokens.weight" if spec.tied and parameter == "lm_head.weight" else parameter
        assert list(names) == named_tensors(model_type, written, 3)
    assert gguf_architecture(model_type) == ARCHITECTURES[model_type]


def test_a_tied_head_is_the_embedding() -> None:
    spec = ModelSpec.from_config(tiny_config("llama").to_dict())
    assert gguf_sources(spec, set())["lm_head.weight"] == ("token_embd.weight",)


def test_experts_that_a_converter_joined_are_one_tensor() -> None:
    spec = ModelSpec.from_config(tiny_config("qwen3_moe").to_dict())
    joined = "blk.0.ffn_gate_up_exps.weight"
    assert gguf_sources(spec, {joined})["model.layers.0.mlp.experts.gate_up_proj"] == (joined,)


def test_what_can_be_read_is_what_the_gguf_package_dequantises() -> None:
    """A type that it learns is to be read here too; one that it does not know must be refused when a file is opened."""
    known = {"F64"}  # numpy reads those
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
            known.add(kind.name)
        except NotImplementedError:
            continue
    assert known == READABLE_TYPES
    assert {kind.name for kind in gguf.GGMLQuantizationType} == {name for name, _, _ in TENSOR_TYPES.values()}
    assert not FLOAT_TYPES & AS_IS.keys()
