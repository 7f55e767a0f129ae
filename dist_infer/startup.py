"""From a run file to running ranks: config -> headers -> facts -> plan -> packed store -> workers -> engine.

Everything up to the plan works without torch. Each step returns a value; nothing is written back into the config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_infer.backend import Backend, Footprint, RankSpec, make_backend
from dist_infer.config import RunConfig
from dist_infer.location import resolve_model
from dist_infer.messages import WorkerReport
from dist_infer.model.stored import stored_encodings
from dist_infer.openmp import release_pool
from dist_infer.worker.setup import StoreLocation, store_key
from partition.checkpoint import CheckpointIndex, check_tensors, open_checkpoint
from partition.encoding import DEFAULT_GROUP_SIZE, EncodingChoice
from partition.errors import CheckpointError, ConfigError, StoreError
from partition.families import family_table
from partition.hardware import HardwareFacts
from partition.model_spec import ModelSpec, text_config
from partition.plan import Plan, PlanOptions, make_plan, unit_bytes
from partition.sharding import cut_axes, units_of

if TYPE_CHECKING:  # offload.pack imports torch, which a plan does not need
    from offload.pack import PackReport

_FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}
_CONFIG_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Progress:
    """Where a start is: phase "packing", "starting workers" or "loading"; done of total (total 0: unknown)."""

    phase: str
    done: int = 0
    total: int = 0
    detail: str = ""


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint's headers, read and checked; no weights."""

    path: Path
    index: CheckpointIndex
    spec: ModelSpec
    dtype: str
    encodings: EncodingChoice
    eos_token_ids: tuple[int, ...]


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a parsed config.json: from the family table, or of any other type from its class (imports torch)."""
    if text_config(config).get("model_type") in family_table():
        return ModelSpec.from_config(config)
    from dist_infer.model.describe import describe

    return describe(config)


def open_model(config: RunConfig, *, weights: bool = True) -> Model:
    """Find the model and read its headers. Raises the tree's errors for anything that could not be run right.

    weights: fetch them too, where the model comes from a hub (a plan needs the config alone).
    """
    path = resolve_model(config.model.path, weights=weights)
    index = open_checkpoint(path)
    spec = spec_of(index.config)
    cut_axes(spec, config.parallel.tensor)  # a degree the family cannot be cut into ends here
    if index.kind != "config_only":
        check_tensors(spec, index)
    dtype = _stored_dtype(index) if config.model.dtype == "auto" else config.model.dtype
    return Model(
        path=path,
        index=index,
        spec=spec,
        dtype=dtype,
        encodings=_encodings(config, index, spec),
        eos_token_ids=_eos_token_ids(path, index.config),
    )


def _encodings(config: RunConfig, index: CheckpointIndex, spec: ModelSpec) -> EncodingChoice:
    offload = config.offload
    group_size = DEFAULT_GROUP_SIZE if offload.group_size == "auto" else offload.group_size
    if offload.encoding == "as-is" and index.kind == "gguf":
        return EncodingChoice(wished="as-is", stored=stored_encodings(index, spec))
    return EncodingChoice(wished=offload.encoding, group_size=group_size)


def plan_run(config: RunConfig, model: Model, facts: HardwareFacts, footprint: Footprint) -> Plan:
    """The plan for these facts. Raises BudgetError or ConfigError naming the key to turn."""
    offload, engine, parallel = config.offload, config.engine, config.parallel
    device = resolve_device(config, facts)
    if device == "cpu" and offload.device_memory != "auto":
        raise ConfigError("offload.device_memory is for GPUs; on cpu there is one memory: set offload.host_memory")
    return make_plan(
        model.spec,
        facts,
        PlanOptions(
            name=config.name,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            dtype=model.dtype,
            encodings=model.encodings,
            # rows are read without a checksum of theirs: not where every read is to be checked
            embedding_rows=offload.verify != "always" and model.spec.table is None,
            device=device,
            device_memory=_number(offload.device_memory),
            host_memory=_number(offload.host_memory),
            num_slots=_number(offload.slots),
            kv_memory=_number(engine.kv_memory),
            block_tokens=engine.block_tokens,
            max_batch_tokens=_number(engine.max_batch_tokens),
            max_requests=_number(engine.max_requests),
            max_model_len=_number(engine.max_model_len),
            process_footprint_bytes=footprint.rank_bytes,
            launcher_footprint_bytes=footprint.launcher_bytes,
        ),
    )


def resolve_device(config: RunConfig, facts: HardwareFacts) -> str:
    device = config.cluster.device
    if device == "auto":
        return "cuda" if all(node.devices for node in facts.nodes) else "cpu"
    if device == "cuda" and not any(node.devices for node in facts.nodes):
        raise ConfigError("cluster.device: cuda, but no GPU is found: use cluster.device: cpu or auto")
    return device


def store_location(config: RunConfig, model: Model) -> StoreLocation:
    """Where the packed store of this model, dtype and tensor degree is, whether it exists or not."""
    from offload.format import store_directory

    location = StoreLocation(
        directory="",
        fingerprint=model.index.fingerprint,
        model_type=model.spec.model_type,
        dtype=model.dtype,
        encoding=model.encodings.name,
        tensor=config.parallel.tensor,
    )
    directory = store_directory(Path(config.offload.store), _label(config, model.path), store_key(location))
    return replace(location, directory=str(directory))


def pack_model(config: RunConfig, model: Model, on_progress: OnProgress) -> tuple[StoreLocation, PackReport]:
    """Make the packed store unless it is there. Returns its place and the PackReport (num_written 0: was there)."""
    from offload.format import open_store
    from offload.pack import PackProgress, PackReport, pack_store

    if model.index.kind == "config_only":
        raise CheckpointError(f"{model.path} has a config.json but no weights: it can be planned, not run")
    location = store_location(config, model)
    tp_ranks = tuple(range(config.parallel.tensor))
    units = [unit.name for unit in units_of(model.spec)]
    with suppress(StoreError):  # the usual case, without the seconds that a source takes to be made
        manifest = open_store(Path(location.directory), store_key(location), units, tp_ranks)
        return location, PackReport(num_written=0, num_reused=len(manifest.blobs), bytes_written=0, seconds=0.0)

    from dist_infer.model.adapter import DTYPES
    from dist_infer.model.source import CheckpointSource

    source = CheckpointSource(
        index=model.index,
        spec=model.spec,
        tensor=len(tp_ranks),
        tp_ranks=tp_ranks,
        dtype=DTYPES[model.dtype],
        encodings=model.encodings,
    )

    def forward(progress: PackProgress) -> None:
        on_progress(
            Progress(phase="packing", done=progress.num_done, total=progress.num_total, detail=progress.message)
        )

    cut = cut_axes(model.spec, len(tp_ranks))
    planned = {
        (unit.name, rank): unit_bytes(unit, cut, rank, model.dtype, model.encodings)
        for unit in units_of(model.spec)
        for rank in tp_ranks
    }
    directory = Path(location.directory)
    report = pack_store(directory, store_key(location), units, tp_ranks, source, forward, planned_bytes=planned)
    return location, report


def _label(config: RunConfig, path: Path) -> str:
    """What people call the model: a hub id's own name (its folder is named by a commit), or the file's or folder's."""
    if path.suffix == ".gguf":
        return path.stem
    return path.name if Path(config.model.path).exists() else config.model.path.rpartition("/")[2]


def _stored_dtype(index: CheckpointIndex) -> str:
    declared = text_config(index.config).get("dtype") or text_config(index.config).get("torch_dtype")
    if declared in _CONFIG_DTYPES:
        return str(declared)
    stored = {entry.dtype for entry in index.tensors.values()}
    if stored and stored <= _FLOAT_DTYPES.keys():
        sizes: dict[str, int] = {}
        for entry in index.tensors.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.start
        return _FLOAT_DTYPES[max(sizes, key=lambda kind: sizes[kind])]
    return "bfloat16"


def _eos_token_ids(path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-text ids of config.json and generation_config.json (chat models often end with another token there)."""
    found: list[int] = []
    generation = path / "generation_config.json"
    sources = [text_config(config)]
    if path.is_dir() and generation.is_file():
        try:
            sources.append(json.loads(generation.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{generation} is not readable JSON: {error}") from error
    for source in sources:
        value = source.get("eos_token_id")
        found += [int(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
    return tuple(dict.fromkeys(found))


def _number(value: int | str) -> int | None:
    return None if isinstance(value, str) else value


class Gang:
    """The ranks of one plan: planned and packed by the constructor, running after `start`.

    Owns backend and executor; `close` ends both. timeline: the ranks record what `executor.timelines` gives.
    """

    def __init__(
        self, config: RunConfig, on_progress: OnProgress, *, timeline: bool = False, apart: bool = False
    ) -> None:
        with ExitStack() as stack:
            self.model = open_model(config)
            self._backend: Backend = make_backend(config.cluster, config.name, apart=apart)
            stack.callback(self._backend.close)
            footprint = self._backend.footprint(config.parallel.tensor, config.parallel.pipeline)
            with_devices = config.cluster.device != "cpu"
            # A misfit must end before anything is packed or started, so plan with assumed rates first.
            facts = self._backend.facts(with_devices=with_devices, sample=None, dtype=None)
            rough = plan_run(config, self.model, facts, footprint)
            store, self.pack_report = pack_model(config, self.model, on_progress)
            streams = any(rank.bytes_in("nvme") for rank in rough.ranks)
            facts = self._backend.facts(
                with_devices=with_devices,
                sample=_largest_file(Path(store.directory)),
                dtype=self.model.dtype,
                # what is read once need not be read by the best reader
                reader="threads" if config.offload.reader == "auto" and not streams else config.offload.reader,
            )
            release_pool()  # this thread has packed and measured; another one of this process may compute
            self.facts = facts
            self.plan = plan_run(config, self.model, facts, footprint)
            self.step_timeout_s = _step_timeout(config, self.plan)
            spec = RankSpec(
                plan=self.plan,
                config_json=json.dumps(dict(self.model.index.config)),
                store=store,
                verify=config.offload.verify,
                readers=tuple(node.reader for node in facts.nodes),
                step_timeout_s=self.step_timeout_s,
                timeline=timeline,
            )
            self.executor = self._backend.executor(
                spec, lambda done, total: on_progress(Progress(phase="loading", done=done, total=total))
            )
            stack.callback(self.executor.close)
            self._on_progress = on_progress
            self._stack = stack.pop_all()
        self.reports: tuple[WorkerReport, ...] = ()

    def start(self) -> None:
        """Bring the ranks up and load them. The caller closes the gang when this raises."""
        self._on_progress(Progress(phase="starting workers"))
        self.reports = self.executor.start()

    @property
    def computes_here(self) -> bool:
        """Whether the ranks live in this process."""
        return self._backend.computes_here(self.plan)

    @property
    def num_kv_blocks(self) -> int:
        return min(report.num_kv_blocks for report in self.reports)

    def close(self) -> None:
        self._stack.close()


def _largest_file(directory: Path) -> Path:
    return max(directory.glob("*.bin"), key=lambda path: path.stat().st_size)


def _step_timeout(config: RunConfig, plan: Plan) -> float:
    if config.engine.step_timeout != "auto":
        return float(config.engine.step_timeout)
    return max(30.0, 10.0 * plan.prediction.seconds_per_pass * plan.max_micro_batches)
