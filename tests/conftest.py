"""Shared by all tests: tiny random checkpoints of real families, the demo model, and its reference answers."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Names of runs are taken machine-wide: those of this session must not meet the user's, nor another session's. This
# one is for what fixtures of the whole session start.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="dist-infer-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_TINY: dict[str, dict[str, Any]] = {
    # 9 query heads in 3 KV groups, like the demo model: two tensor ranks cannot get the same number
    "llama": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "layer_types": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": 5},
    "gemma2": {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "cohere2": {"sliding_window": 4},
    "glm4": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A transformers config of the family, small enough for milliseconds."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_TINY.get(model_type, {}),
        **changes,
    }
    if model_type == "gemma3_text":
        kinds = ("sliding_attention", "full_attention")
        values["layer_types"] = [kinds[i % 2] for i in range(values["num_hidden_layers"])]
    return CONFIG_MAPPING[model_type](**values)


@pytest.fixture(scope="module", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where runs are written down: for each module, so that none is refused a name, or cleared away, by another's."""
    directory = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(directory))
        yield directory


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_checkpoint(model_type, seed=0, **config changes): a directory with random fp32 weights, made once."""
    made: dict[str, Path] = {}

    def make(model_type: str, seed: int = 0, **changes: Any) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        name = json.dumps([model_type, seed, changes], sort_keys=True)
        if name not in made:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in model.parameters():  # far from the tiny default init, so that errors show
                    if parameter.ndim >= 2:
                        parameter.normal_(0, 0.15)
                    else:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                own = dict(model.named_parameters())
                for name, tensor in model.state_dict().items():  # a stored buffer (DeepSeek's router bias) starts as 0
                    if name not in own:
                        tensor.add_(torch.randn_like(tensor) * 0.1)
            directory = tmp_path_factory.mktemp(f"tiny-{model_type}")
            model.save_pretrained(directory)
            made[name] = directory
        return made[name]

    return make


@pytest.fixture(scope="session")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One root for the packed stores of a test run, so that equal ones are packed once."""
    return tmp_path_factory.mktemp("stores")
