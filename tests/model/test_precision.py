"""Half precision: no less exact than transformers in the same dtype, and float32 where the family keeps float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from half_precision import IDS, eager_logits, models_of, own_logits, typical_error
from safetensors.torch import load_file, save_file
from small_engine import PROMPTS, run_config
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dist_infer import LLM, SamplingParams, load_config
from dist_infer.messages import SamplingSpec
from dist_infer.model.adapter import DTYPES, StageModel, kept_dtypes, meta_model
from dist_infer.model.describe import describe, unchecked_types
from dist_infer.model.source import CheckpointSource
from dist_infer.startup import open_model, store_location
from dist_infer.worker.sampler import sample
from offload.format import read_manifest
from offload.views import UnitWeights
from partition.checkpoint import open_checkpoint
from partition.encoding import EncodingChoice
from partition.model_spec import ModelSpec
from partition.sharding import units_of

FAMILIES = ("llama", "mixtral", "deepseek_v3", "gpt_oss", "gemma2")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_exact_as_the_library_s_own(
    family: str, dtype: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Guards a step of ours that rounds more often, or in a smaller type, than the class alone would."""
    paths = models_of(family, tiny_checkpoint)
    exact = [eager_logits(path, torch.float32) for path in paths]
    theirs = typical_error([eager_logits(path, HALF[dtype]) for path in paths], exact)
    ours = typical_error([own_logits(path, HALF[dtype]) for path in paths], exact)
    assert theirs > 1e-4, "the library did not compute in half precision"
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_kept_in_the_library_s_dtypes(
    family: str, dtype: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Guards a router's bias or a norm that goes by way of the model's dtype: bits and dtypes of from_pretrained."""
    path = models_of(family, tiny_checkpoint)[0]
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    source = CheckpointSource(index=index, spec=spec, tensor=1, tp_ranks=[0], dtype=DTYPES[dtype])
    ours = {name: found for unit in units_of(spec) for name, found in source.load_unit(unit.name)[0].items()}
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (name, ours[name].dtype) == (name, tensor.dtype)
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("family", "dtype", "kept"),
    [
        ("deepseek_v3", "bfloat16", {"e_score_correction_bias"}),
        ("deepseek_v3", "float16", {"e_score_correction_bias"}),
        ("gpt_oss", "float16", {"norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight"}),
        ("gpt_oss", "bfloat16", set()),
        ("gemma2", "float16", set()),
    ],
)
def test_what_stays_float32_does_so_in_the_store_and_when_it_is_computed_with(
    family: str,
    dtype: str,
    kept: set[str],
    tiny_checkpoint: Callable[..., Path],
    store_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config(run_config(models_of(family, tiny_checkpoint)[0], store_root, streamed=False, dtype=dtype))
    bound: dict[str, torch.dtype] = {}
    bind = StageModel.bind

    def spy(self: StageModel, unit: str, tensors: UnitWeights) -> None:
        bound.update({name: tensor.dtype for name, tensor in tensors.items()})
        bind(self, unit, tensors)

    monkeypatch.setattr(StageModel, "bind", spy)
    with LLM(config) as llm:
        llm.generate([PROMPTS[1]], SamplingParams(max_tokens=1, temperature=0))
        planned = {unit.name: unit.num_bytes for unit in llm.plan.ranks[0].units}
    blobs = read_manifest(Path(store_location(config, open_model(config)).directory)).blobs
    stored = {array.name: array.dtype for blob in blobs for array in blob.tensors}
    leaves = {name for name in stored if any(name.endswith(f".{leaf}") for leaf in kept)}
    assert len(leaves) >= len(kept)
    assert stored == {name: "float32" if name in leaves else dtype for name in stored}
    assert bound == {name: DTYPES[kind] for name, kind in stored.items()}
    assert planned == {blob.unit: blob.length for blob in blobs}


def test_a_type_without_a_table_keeps_what_its_class_keeps() -> None:
    """Guards the description of other types: by the class's lists, and by a parameter made in float32 itself."""

    def kept_in(dtype: str, model_type: str) -> set[str]:
        config = CONFIG_MAPPING[model_type](num_hidden_layers=2).to_dict()
        with unchecked_types():
            spec = describe(config)
        rows = [p for unit in units_of(spec) for p in unit.parameters]
        return {row.name.rpartition(".")[2] for row in rows if row.dtype_in(dtype) != dtype}

    assert kept_in("bfloat16", "glm4_moe") == kept_in("float16", "glm4_moe") == {"e_score_correction_bias"}
    model = meta_model(CONFIG_MAPPING["llama"](num_hidden_layers=1).to_dict(), torch.bfloat16)
    assert kept_dtypes(model) == {}
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    assert kept_dtypes(model) == {"model.norm.weight": {"dtype": "float32"}}


def test_what_is_kept_exact_is_never_encoded() -> None:
    """Also where it is a matrix, and in whatever dtype the plan computes."""
    spec = ModelSpec.from_config(CONFIG_MAPPING["gpt_oss"](num_hidden_layers=1).to_dict())
    choice = EncodingChoice(wished="int8")
    norm = next(p for p in units_of(spec)[1].parameters if p.name.endswith("input_layernorm.weight"))
    assert (norm.dtype_in("float16"), norm.dtype_in("bfloat16")) == ("float32", "bfloat16")
    assert norm.is_exact
    assert choice.of("layers.0", norm, (64, 64)) == "raw"


def test_scores_past_float16_are_no_overflow(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Guards q·k in float16 before it is scaled: fused attention, which the library would use, keeps it in float32."""
    path = tmp_path / "hot"
    path.mkdir()
    for file in models_of("llama", tiny_checkpoint)[0].iterdir():
        if file.suffix == ".json":
            (path / file.name).write_bytes(file.read_bytes())
            continue
        tensors: dict[str, Any] = load_file(file)
        hot = {name: 200 * tensor for name, tensor in tensors.items() if "q_proj" in name or "k_proj" in name}
        save_file(tensors | hot, path / file.name, metadata={"format": "pt"})
    assert not eager_logits(path, torch.float16).isfinite().all(), "no longer hot: this tests nothing"
    theirs, ours = eager_logits(path, torch.float16, "sdpa"), own_logits(path, torch.float16)
    assert ours.isfinite().all()
    assert typical_error([ours], [theirs]) < 1e-2
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


def test_sampling_computes_in_float32() -> None:
    """Guards a temperature that overflows float16, and log-probabilities with three digits."""
    logits = torch.tensor([[400.0, 399.0, 380.0] + [0.0] * len(IDS)], dtype=torch.float16)
    cold = SamplingSpec(temperature=0.005, seed=1, num_logprobs=2)
    (token,) = sample(logits, ["a"], [cold], [0])
    assert token.token_id == 0
    assert token.logprob is not None
    assert token.logprob == pytest.approx(float(logits.double().log_softmax(-1)[0, 0]), rel=1e-6)
