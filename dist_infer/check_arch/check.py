"""The check of one model type or directory, in this process: tiny config, checkpoint, reference, then every layout."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dist_infer.check_arch.checkpoint import write_checkpoint
from dist_infer.check_arch.layout import Layout
from dist_infer.check_arch.reference import Reference
from dist_infer.check_arch.report import LayoutReport, TypeReport
from dist_infer.check_arch.run import run_layout
from dist_infer.check_arch.tiny_config import is_directory, read_config, text_type, tiny_config, tiny_config_of
from dist_infer.check_arch.verdict import compare
from dist_infer.model.adapter import transformers_config
from dist_infer.model.describe import unchecked_types
from partition.errors import BudgetError, CheckpointError, ConfigError, UnsupportedModelError
from partition.kv_layout import kv_bytes_per_token


def check(target: str, layouts: Sequence[Layout], work: Path) -> TypeReport:
    """target: a model type, or the directory of a model (its config.json alone is read). work: an empty directory.

    Raises CheckpointError for a target that is neither, or whose config.json cannot be read; all else is in the report.
    """
    started = time.monotonic()
    model_type = target
    try:
        if is_directory(target):
            config = tiny_config_of(read_config(Path(target)))
        else:
            model_type = text_type(target)
            config = tiny_config(target)
        model_type = str(config.model_type)
        architecture = write_checkpoint(config, work / "model")
        reference = Reference(work / "model")
        reference.logprobs((5, 6, 7))  # before anything of ours runs
    except UnsupportedModelError as error:
        reason = own_refusal(target)
        return TypeReport(
            target=target,
            model_type=model_type,
            problem=reason or str(error),
            refused=bool(reason),
            seconds=time.monotonic() - started,
        )
    found: list[LayoutReport] = []
    kv_bytes: int | None = None
    for layout in layouts:
        report, kv = _check_layout(layout, work, reference)
        found.append(report)
        kv_bytes = kv if kv_bytes is None else kv_bytes
    return TypeReport(
        target=target,
        model_type=model_type,
        architecture=architecture,
        shape=shape_of(config),
        kv_bytes_per_token=kv_bytes,
        layouts=tuple(found),
        seconds=time.monotonic() - started,
    )


def own_refusal(model_type: str) -> str:
    """Why dist-infer refuses a model of this type by its config alone; empty where it does not."""
    if model_type not in CONFIG_MAPPING:
        return ""
    try:
        default = CONFIG_MAPPING[model_type]().to_dict()
    except Exception:  # the library refuses its own default: there is no config to ask about
        return ""
    try:
        transformers_config(default)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def refusal(error: BaseException) -> bool:
    """Whether an error says that the model, so cut, is not run; anything else is a failure of ours.

    An error of another process arrives as its text.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnsupportedModelError):
            return True
        cause = cause.__cause__
    if isinstance(error, BudgetError):
        return False
    return isinstance(error, ConfigError | CheckpointError) or UnsupportedModelError.__name__ in str(error)


def shape_of(config: PretrainedConfig) -> str:
    """The tiny model in a few words: what makes it the family it is."""
    words = {
        "num_hidden_layers": "layers",
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "num_key_value_heads": "KV heads",
        "head_dim": "per head",
        "sliding_window": "window",
        "attention_chunk_size": "chunk",
        "kv_lora_rank": "KV latent",
        "vocab_size": "vocabulary",
    }
    words |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "experts")
    parts: dict[str, str] = {}
    for key, word in words.items():
        value = getattr(config, key, None)
        if isinstance(value, int) and not isinstance(value, bool):
            parts.setdefault(word, f"{word} {value}")
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and kinds:
        parts["kinds"] = "/".join(dict.fromkeys(str(kind) for kind in kinds))
    return ", ".join(parts.values())


def _check_layout(layout: Layout, work: Path, reference: Reference) -> tuple[LayoutReport, int | None]:
    """And the bytes of KV that a token takes, where it ran."""
    started = time.monotonic()
    try:
        with unchecked_types():
            result = run_layout(work / "model", work / "stores", layout)
    except Exception as error:  # whatever comes out of a run is the finding
        refused = refusal(error)
        message = str(error) if refused else f"{type(error).__name__}: {error}"
        message = message.replace(f"{work / 'model'}: ", "").replace(str(work / "model"), "the checkpoint")
        seconds = time.monotonic() - started
        verdict = LayoutReport(
            layout=layout, verdict="refused" if refused else "failed", message=message, seconds=seconds
        )
        return verdict, None
    plan = result.plan
    try:
        comparison = compare(result.positions, reference.logprobs)
    except UnsupportedModelError as error:  # transformers itself does not get through this sequence
        return LayoutReport(layout=layout, verdict="failed", path=plan.model.path, message=str(error)), None
    report = LayoutReport(
        layout=layout,
        verdict=comparison.verdict,
        path=plan.model.path,
        error=comparison.error,
        num_agreeing=comparison.num_agreeing,
        num_positions=comparison.num_positions,
        bytes_streamed=result.bytes_streamed,
        message="" if comparison.verdict == "equal" else f"relative error {comparison.error:.1e}",
        seconds=time.monotonic() - started,
    )
    return report, kv_bytes_per_token(plan.model, plan.dtype)
