"""The run file: what people write in YAML, frozen once read. Unknown keys are errors that name the nearest key.

Each section belongs to the part that reads it; only `load_config`'s callers ever hold the root. Sizes are written
`512 MiB`, times `30 s`; `auto` is allowed where the planner can decide.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dist_infer.config_errors import explain
from dist_infer.config_types import AutoCount, AutoSeconds, AutoSize, Count, ReaderKind, Seconds, Section
from dist_infer.generate_config import GenerateConfig
from dist_infer.serve_config import ServeConfig
from partition.errors import ConfigError
from partition.yaml_loader import parse_yaml


class ModelConfig(Section):
    """Which model, and in which number format it computes."""

    path: str = Field(
        min_length=1,
        description="A directory (config.json, safetensors, tokenizer), a GGUF file, `package:NAME/FILE` for a file "
        "inside an installed Python package, or a hub id such as `org/model` (needs huggingface_hub and a network). "
        "A relative path is taken from the run file's directory.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of weights, activations and KV cache. auto: what the checkpoint is stored in; "
        "bfloat16 for a quantized GGUF.",
    )


class ParallelConfig(Section):
    """How many ranks share the model."""

    tensor: Count = Field(
        1, description="Ranks that share every layer (whole KV groups each, unevenly where it does not divide them)."
    )
    pipeline: Count = Field(1, description="Stages: consecutive runs of layers, balanced by bytes.")


class OffloadConfig(Section):
    """Where weights live: the packed store on local disk, and how much memory may hold them."""

    store: str = Field(
        "~/.cache/dist-infer/stores",
        min_length=1,
        description="Directory for packed stores, on a local NVMe. One store per model, dtype and tensor degree is "
        "made below it, once. A relative path is taken from the run file's directory.",
    )
    device_memory: AutoSize = Field(
        "auto",
        description="Ceiling, per rank, for what is allocated on a GPU: resident weights, slots, KV cache, "
        "activations. auto: what the device has free, less a reserve. On cpu there is one memory, host_memory, and "
        "this key is refused.",
    )
    host_memory: AutoSize = Field(
        "auto",
        description="Ceiling, per node and shared by its ranks, for what is allocated in host memory: on cpu "
        "resident weights, slots, KV cache and activations; with GPUs host-tier units and pinned slots. auto: what "
        "the machine or its memory cgroup has, less the processes' own footprint and a reserve.",
    )
    encoding: Literal["float", "int8", "int4", "fp8", "as-is"] = Field(
        "float",
        description="How the layers' matrices are stored at rest, and so how many bytes a pass streams. float: in "
        "model.dtype, bit-exact. int8: a scale per row. int4: groups of group_size columns with a scale and a minimum "
        "each. fp8: e4m3 in groups of 128. as-is: what a GGUF holds (Q4_0, Q4_1 and Q8_0 exactly, other types as the "
        "nearest of these); float for safetensors. Embeddings, head, norms and routers stay floats. What each costs in "
        "quality: docs/quantization.md.",
    )
    group_size: Literal["auto", 128, 64, 32] = Field(
        "auto",
        description="Columns that share a scale in int4: fewer are more exact and take more bytes (128: 4.25 bits a "
        "weight, 64: 4.5, 32: 5). auto: 64. A matrix whose width it does not divide gets smaller groups.",
    )
    reader: ReaderKind = Field(
        "auto",
        description="How the store is read. threads: O_DIRECT preadv in a few threads. aio: Linux asynchronous I/O. "
        "deepspeed: DeepSpeed's async_io (`pip install 'dist-infer[deepspeed]'`, then "
        "`python -m offload.readers.deepspeed` builds it). auto: the fastest of those that are there, measured on the "
        "store for two seconds when weights are streamed.",
    )
    slots: AutoCount = Field(
        "auto", description="Buffers of the streaming ring per rank, each as large as the largest streamed unit; ≥ 2."
    )
    verify: Literal["first", "always", "never"] = Field(
        "first",
        description="When a unit's checksum is compared: the first time a process reads it, at every read, or never.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> OffloadConfig:
        if self.slots == 1:
            raise ValueError("slots must be at least 2: one is computed from while the other is being read")
        if self.group_size != "auto" and self.encoding != "int4":
            raise ValueError(f"group_size is for encoding: int4, not for {self.encoding}: leave one of them out")
        return self


class EngineConfig(Section):
    """Batching and the KV cache."""

    kv_memory: AutoSize = Field(
        "auto",
        description="KV cache per rank. auto: KV and weights share one budget, and the split with the most predicted "
        "output tokens per second is taken, up to max_requests of 2048 tokens (or max_model_len).",
    )
    block_tokens: Annotated[int, Field(ge=1, le=256)] = Field(16, description="Token positions in one KV block.")
    max_batch_tokens: AutoCount = Field(
        "auto", description="Tokens in one micro-batch. A step may hold several while weights are streamed."
    )
    max_requests: AutoCount = Field("auto", description="Requests that run at the same time; more wait their turn.")
    max_model_len: AutoCount = Field(
        "auto", description="Longest prompt + answer. auto: the model's own limit, at most 8192 and what KV holds."
    )
    step_timeout: AutoSeconds = Field(
        "auto", description="A step that takes longer is a failure. auto: 30 s, or ten times the predicted pass."
    )


class ClusterConfig(Section):
    """Where the ranks run."""

    executor: Literal["local", "ray"] = Field(
        "local",
        description="local: this machine, no Ray (one process; one more for each tensor rank with "
        "parallel.tensor > 1 and where the run serves). ray: one actor per rank.",
    )
    address: str | None = Field(
        None,
        description="Address of a running Ray cluster (`host:port` or `auto`). Without it a Ray is started for this "
        "run and stopped after it. Only with executor ray.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where a GPU is found.")
    start_timeout: Seconds = Field(300.0, description="From starting the workers to all of them ready.")
    heartbeat_timeout: Seconds = Field(
        5.0,
        description="A rank that has not answered for so long whether it is there is lost. It is asked every second, "
        "also in the middle of a pass.",
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        3,
        description="How often, within restart_window, ranks that were lost are replaced by others. Requests wait "
        "meanwhile and go on from where they were; after that each ends with an error. 0: never.",
    )
    restart_window: Seconds = Field(600.0, description="The time over which max_restarts are counted.")
    interface: str | None = Field(
        None,
        min_length=1,
        description="What the ranks talk to each other through: a network interface (`eth1`) or, where nodes name "
        "theirs differently, a network (`10.1.0.0/16`). none: the interface by which rank 0's node is reached. Only "
        "with executor ray.",
    )
    node_labels: dict[str, str] = Field(
        {},
        description="Ray labels, `{zone: a}`: only nodes that have all of them take part. Only with address.",
    )
    node_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Ray resources, `{llm: 1}`, that each rank takes beside its CPU or GPU: only nodes that have them "
        "take part, and as many ranks as they have them for. Only with address.",
    )

    @model_validator(mode="after")
    def _address_needs_ray(self) -> ClusterConfig:
        if self.address is not None and self.executor != "ray":
            raise ValueError("cluster.address needs cluster.executor: ray")
        if self.interface is not None and self.executor != "ray":
            raise ValueError("cluster.interface needs cluster.executor: ray; a local run stays on loopback")
        if (self.node_labels or self.node_resources) and self.address is None:
            raise ValueError("cluster.node_labels and .node_resources choose nodes of a cluster: set cluster.address")
        if {"CPU", "GPU"} & self.node_resources.keys():
            raise ValueError("cluster.node_resources: each rank takes its CPU or GPU anyway; name other resources")
        return self


class RunConfig(Section):
    """The whole run file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = Field(
        "dist-infer", description="Name of the run: letters, digits, dot, dash, underscore."
    )
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    offload: OffloadConfig = OffloadConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    run: Annotated[GenerateConfig | ServeConfig, Field(discriminator="kind")] | None = Field(
        None, description="What `dist-infer launch` does."
    )


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file (or take a mapping), apply `a.b=c` overrides, validate.

    Relative paths of models, stores and prompt files are made absolute: those in a file against its directory, those in
    a mapping or an override against the current one.
    Raises ConfigError: no such file, no YAML, unknown key (with the nearest), wrong type or value, with its place.
    """
    if isinstance(source, Mapping):
        data, base, origin = _copied(source), Path.cwd(), "config"
    else:
        path = _expanded(str(source))
        data, base, origin = _read_yaml(path), path.absolute().parent, str(source)
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: a run file is a mapping with keys such as `model:`; found {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error, RunConfig)}") from None
    run = config.run
    if isinstance(run, ServeConfig):
        run = _anchored_serve(run, base)
    elif run is not None and run.prompts_file is not None:
        run = run.model_copy(update={"prompts_file": str(base / _expanded(run.prompts_file))})
    return config.model_copy(
        update={
            "run": run,
            "model": config.model.model_copy(update={"path": _anchored(config.model.path, base)}),
            "offload": config.offload.model_copy(update={"store": str(base / _expanded(config.offload.store))}),
        }
    )


def _anchored_serve(run: ServeConfig, base: Path) -> ServeConfig:
    files = {"api_keys_file": run.api_keys_file, "access_log": run.access_log, "log_file": run.log_file}
    changes: dict[str, Any] = {name: str(base / _expanded(file)) for name, file in files.items() if file is not None}
    if (tls := run.tls) is not None:
        pem = {"certificate": str(base / _expanded(tls.certificate)), "key": str(base / _expanded(tls.key))}
        changes["tls"] = tls.model_copy(update=pem)
    return run.model_copy(update=changes)


def _anchored(path: str, base: Path) -> str:
    """Local paths become absolute; `package:` references and hub ids stay."""
    if path.startswith("package:"):
        return path
    local = base / _expanded(path)
    looks_local = path.startswith((".", "/", "~")) or path.endswith(".gguf") or path.count("/") != 1
    return str(local) if looks_local or os.path.exists(local) else path


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path!r}: {error}") from None


def _copied(source: Mapping[str, Any]) -> Any:
    """A deep copy of what YAML could have said: tuples are lists, paths are texts."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{value!r} is none of them")

    try:
        return json.loads(json.dumps(dict(source), default=plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"config: only mappings, lists, texts and numbers can be in it: {error}") from None


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no run file at {path}: give the path of a YAML file, e.g. configs/quickstart.yaml"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a null character
        raise ConfigError(f"cannot read the run file {path}: {error}") from error
    try:
        return parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path} is {error}") from None


def _override(data: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise ConfigError(f"--set takes a.b=value, not {text!r}")
    target = data
    for name in names[:-1]:
        nested = target.setdefault(name, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"--set {text}: {name} is a value, not a section")
        target = nested
    try:
        parsed = parse_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"--set {text[:200]}: the value is {error}") from None
    if isinstance(parsed, str) and names == ["model", "path"]:
        parsed = _anchored(parsed, Path.cwd())
    elif isinstance(parsed, str) and names in (["offload", "store"], ["run", "prompts_file"]):
        parsed = str(Path.cwd() / _expanded(parsed))
    target[names[-1]] = parsed
