"""What is settled before memory is shared out: axes and layers cut, every blob weighed, stages placed on nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partition.blob_spec import blob_arrays, blob_bytes, decoded_bytes
from partition.cost import active_parameters
from partition.cut_points import CutPoint, cut_points
from partition.errors import ConfigError
from partition.hardware import HardwareFacts
from partition.model_spec import ModelSpec
from partition.placement import HostLimit, host_limits, place_stages
from partition.plan_data import DTYPE_BYTES, PlanOptions
from partition.sharding import AxisCut, UnitSpec, cut_axes, units_of
from partition.stages import cut_stages
from partition.tiers import DEFAULT_SLOTS, MIN_SLOTS, Cycle

DEFAULT_MAX_REQUESTS = 64
DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}


@dataclass(frozen=True, kw_only=True)
class UnitWeight:
    """What a unit weighs. Bytes per tensor rank; `decoded_bytes`: of its largest encoded matrix once decoded."""

    num_bytes: tuple[int, ...]
    decoded_bytes: tuple[int, ...]
    cuts: tuple[CutPoint, ...]
    active_parameters: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage before tiers are chosen. `units[name]` in order of use; `cycle`: the same units, for choosing tiers.

    `rows`: units before these of which a pass reads rows from disk.
    """

    node: int
    first_layer: int
    end_layer: int
    units: dict[str, UnitWeight]
    cycle: Cycle
    rows: dict[str, UnitWeight]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.units)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """[unit][tp_rank] in bytes."""
        return tuple(unit.num_bytes for unit in self.units.values())

    @property
    def ends(self) -> tuple[int, ...]:
        """Positions of the embedding and the head."""
        return tuple(i for i, name in enumerate(self.units) if name in ("embed", "head"))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Everything that is settled before memory is shared out."""

    spec: ModelSpec
    hardware: HardwareFacts
    options: PlanOptions
    cut: AxisCut
    stages: tuple[Stage, ...]
    limits: dict[int, HostLimit]
    max_batch_tokens: int
    max_requests: int
    wanted_slots: int
    least_slots: int


def prepare(
    spec: ModelSpec,
    hardware: HardwareFacts,
    options: PlanOptions,
    *,
    embedding_rows: bool,
    shares: Sequence[float] | None = None,
) -> Work:
    """Check the options, cut axes and layers, place stages, set host limits. Raises ConfigError and BudgetError.

    embedding_rows: the embedding stays on disk, and takes no part in sharing out memory. shares: of each stage, where
    they are not to be equally large.
    """
    _check(options, spec)
    cut = cut_axes(spec, options.tensor)
    weights = _weigh(spec, cut, options)
    ranges = cut_stages(
        [sum(weights[f"layers.{i}"].num_bytes) for i in range(spec.num_layers)],
        embed_bytes=0 if embedding_rows else sum(weights["embed"].num_bytes),
        head_bytes=sum(weights["head"].num_bytes),
        num_stages=options.pipeline,
        shares=shares,
    )
    nodes = place_stages(hardware, tensor=options.tensor, pipeline=options.pipeline, device=options.device)
    stages = []
    cycles: dict[tuple[int, ...], Cycle] = {}  # stages that weigh the same share one
    for (first, end), node in zip(ranges, nodes, strict=True):
        names = tuple(f"layers.{i}" for i in range(first, end))
        names = ("embed", *names) if first == 0 and not embedding_rows else names
        names = (*names, "head") if end == spec.num_layers else names
        alike = tuple(id(weights[name]) for name in names)
        if alike not in cycles:
            cycles[alike] = Cycle(
                [weights[name].num_bytes for name in names],
                pinned_first=[i for i, name in enumerate(names) if name in ("embed", "head")],
                cuts=[weights[name].cuts for name in names] if options.device == "cpu" else None,
            )
        stages.append(
            Stage(
                node=node,
                first_layer=first,
                end_layer=end,
                units={name: weights[name] for name in names},
                cycle=cycles[alike],
                rows={"embed": weights["embed"]} if first == 0 and embedding_rows else {},
            )
        )
    return Work(
        spec=spec,
        hardware=hardware,
        options=options,
        cut=cut,
        stages=tuple(stages),
        limits=host_limits(hardware, nodes, options),
        max_batch_tokens=options.max_batch_tokens or DEFAULT_BATCH_TOKENS[options.device],
        max_requests=options.max_requests or DEFAULT_MAX_REQUESTS,
        wanted_slots=options.num_slots or DEFAULT_SLOTS,
        least_slots=options.num_slots or MIN_SLOTS,
    )


def _weigh(spec: ModelSpec, cut: AxisCut, options: PlanOptions) -> dict[str, UnitWeight]:
    """Every unit's weight by name. Layers of one kind weigh the same if the checkpoint stores them alike."""
    kinds = {f"layers.{i}": kind for i, kind in enumerate(spec.layer_kinds)}
    known: dict[tuple[str | None, ...], UnitWeight] = {}
    weights = {}
    for unit in units_of(spec):
        stored = (options.encodings.stored.get(parameter.name) for parameter in unit.parameters)
        alike = (kinds.get(unit.name, unit.name), *stored)
        if alike not in known:
            known[alike] = _weight(unit, spec, cut, options)
        weights[unit.name] = known[alike]
    return weights


def _weight(unit: UnitSpec, spec: ModelSpec, cut: AxisCut, options: PlanOptions) -> UnitWeight:
    ranks = range(options.tensor)
    blobs = [blob_arrays(unit, cut, rank, options.dtype, options.encodings) for rank in ranks]
    return UnitWeight(
        num_bytes=tuple(blob_bytes(arrays) for arrays in blobs),
        decoded_bytes=tuple(decoded_bytes(unit, cut, rank, options.dtype, options.encodings) for rank in ranks),
        cuts=cut_points(blobs) if unit.name.startswith("layers.") else (),
        active_parameters=active_parameters(unit, spec),
    )


def _check(options: PlanOptions, spec: ModelSpec) -> None:
    if options.device not in DEFAULT_BATCH_TOKENS:
        raise ConfigError(f"device is {options.device!r}, but must be one of {', '.join(DEFAULT_BATCH_TOKENS)}")
    if options.dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {options.dtype!r}, but must be one of {', '.join(DTYPE_BYTES)}")
    if options.device == "cpu" and options.device_memory is not None:
        raise ConfigError("offload.device_memory is set, but there is no device: on cpu use offload.host_memory")
    for key, value, least in (
        ("parallel.tensor", options.tensor, 1),
        ("parallel.pipeline", options.pipeline, 1),
        ("offload.num_slots", options.num_slots, MIN_SLOTS),
        ("engine.block_tokens", options.block_tokens, 1),
        ("engine.max_batch_tokens", options.max_batch_tokens, 1),
        ("engine.max_requests", options.max_requests, 1),
        ("engine.max_model_len", options.max_model_len, 2),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{key} is {value}, but must be at least {least}")
    if options.max_model_len is not None and options.max_model_len > spec.max_position:
        raise ConfigError(
            f"engine.max_model_len is {options.max_model_len}, but the model knows only {spec.max_position} positions"
        )
