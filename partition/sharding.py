"""Which elements of which parameter each tensor-parallel rank owns, and where ranks must talk. Pure data.

q heads   0 1 2 | 3 4 5 | 6 7 8        9 heads in 3 KV groups, tensor = 2:
kv heads    0   |   1   |   2          rank 0 owns groups 0 and 1, rank 1 owns group 2;
owner     └── rank 0 ───┘ rank 1       no rank ever owns a part of a head
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from partition.errors import ConfigError, UnsupportedModelError
from partition.model_spec import ModelSpec

Interval = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Along `dim` the size is `blocks` equal consecutive parts, each cut by `axis`.

    A part's size divided by the axis' size is the number of elements of one axis position (e.g. head_dim).
    `axes`: instead of equal parts one for each of these axes, which all have positions of the same width (q, k and v).
    """

    dim: int
    axis: str
    blocks: int = 1
    axes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """One parameter, whole. `split` None: every rank has all of it.

    `once`: the bias of a row-parallel module: rank 0 keeps it and the others hold zeros, since the outputs are summed.
    `dtype` None: the plan's dtype; a name: kept in that dtype whatever the plan's. `half_dtype` says the same for plans
    in float16 alone. What is kept in is `dtype_in(the plan's dtype)`.
    """

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    once: bool = False
    dtype: str | None = None
    half_dtype: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the family wants it more exact than the rest, in some dtype."""
        return self.dtype is not None or self.half_dtype is not None

    def dtype_in(self, dtype: str) -> str:
        """Its dtype in a plan of `dtype`, by torch's name."""
        return self.dtype or (self.half_dtype if dtype == "float16" else None) or dtype


@dataclass(frozen=True, kw_only=True)
class UnitSpec:
    """What is moved as a whole: "embed", "layers.0" … "layers.N-1", "head" (final norm and lm_head)."""

    name: str
    parameters: tuple[ParameterSpec, ...]


@dataclass(frozen=True, kw_only=True)
class AxisCut:
    """`intervals[axis][tp_rank]` is the half-open interval of axis positions that the rank owns."""

    tensor: int
    intervals: dict[str, tuple[Interval, ...]]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What happens to a module's output on every tp rank.

    `all_reduce`: sum. `mask_all_reduce`: rows of foreign token ids give zero, then sum (exact). `gather_vocab`: the
    ranks' vocabulary slices are joined in rank order. `norm_q_head`, `norm_kv_head`: the module is an RMS norm over the
    width that the heads of all ranks have together: squares are summed over ranks. `local_heads`: the module reads
    numbers of heads from its config, and is given one with this rank's. `module` has {i} for the layer; `layer_kinds`
    names the kinds of layer that have the module, and is empty outside of layers.
    """

    module: str
    kind: str
    layer_kinds: tuple[str, ...] = ()


def units_of(spec: ModelSpec) -> tuple[UnitSpec, ...]:
    """All units in order of use. A tied head has its own copy of the embedding, named lm_head.weight."""
    family = spec.family
    ends: dict[str, list[ParameterSpec]] = {"embed": [], "head": []}
    for row in family["outer"]:
        unit = row.get("unit") or ("embed" if row["name"].startswith("model.embed_tokens.") else "head")
        ends[unit].append(_parameter(spec, row, row["name"]))
    tables = {
        kind: [row for row in rows if _holds(row.get("when", ()), spec.flags)]
        for kind, rows in family["layers"].items()
    }
    layers = [
        UnitSpec(
            name=f"layers.{i}",
            parameters=tuple(_parameter(spec, row, row["name"].replace("{i}", str(i))) for row in tables[kind]),
        )
        for i, kind in enumerate(spec.layer_kinds)
    ]
    return (
        UnitSpec(name="embed", parameters=tuple(ends["embed"])),
        *layers,
        UnitSpec(name="head", parameters=tuple(ends["head"])),
    )


def collectives_of(spec: ModelSpec) -> tuple[Collective, ...]:
    """Where the tensor-parallel ranks of a stage must talk."""
    return tuple(
        Collective(module=row["module"], kind=row["kind"], layer_kinds=tuple(row["layer_kinds"]))
        for row in spec.family["collectives"]
        if not row["layer_kinds"] or set(row["layer_kinds"]) & set(spec.layer_kinds)
    )


def splits_attention(spec: ModelSpec) -> bool:
    """Whether ranks own different heads; where not, each of them computes all of attention and keeps all KV."""
    return bool(spec.family["attention"] == "heads")


def local_heads(spec: ModelSpec, cut: AxisCut, tp_rank: int) -> tuple[int, int]:
    """(query heads, KV heads) that this rank computes."""
    if not splits_attention(spec):
        return spec.num_heads, spec.num_kv_heads
    (q_start, q_end), (kv_start, kv_end) = cut.intervals["q_head"][tp_rank], cut.intervals["kv_head"][tp_rank]
    return q_end - q_start, kv_end - kv_start


def cut_axes(spec: ModelSpec, tensor: int) -> AxisCut:
    """Cut every axis among `tensor` ranks; the first ranks get the larger parts.

    Heads go by whole KV groups. With more ranks than KV heads, rank r is given KV head r*kv//tensor, and the ranks that
    share a KV head split its query heads. Raises ConfigError when a rank would be left without work.
    """
    if tensor < 1:
        raise ConfigError(f"parallel.tensor must be at least 1, not {tensor}")
    if tensor > 1 and spec.table is not None:
        raise UnsupportedModelError(
            f"parallel.tensor is {tensor}, but {spec.model_type} cannot be cut into tensor ranks here: use "
            "parallel.tensor: 1, and parallel.pipeline for more ranks"
        )
    dims = spec.dims
    sizes = {"vocab": dims["vocab"], "mlp": dims.get("inter"), "expert_mlp": dims.get("moe_inter")}
    sizes["shared_mlp"] = dims.get("shared_inter")
    intervals = {axis: _even(axis, size, tensor) for axis, size in sizes.items() if size is not None}
    if splits_attention(spec):
        intervals["q_head"], intervals["kv_head"] = _heads(spec.num_heads, spec.num_kv_heads, tensor)
    return AxisCut(tensor=tensor, intervals=intervals)


def shard_intervals(parameter: ParameterSpec, cut: AxisCut, tp_rank: int) -> tuple[Interval, ...]:
    """The rank's half-open intervals along `split.dim`, one a block, in order; () for a parameter that is not split."""
    split = parameter.split
    if split is None:
        return ()
    axes = split.axes or (split.axis,) * split.blocks
    sizes = [max(end for _, end in cut.intervals[axis]) for axis in axes]
    width, rest = divmod(parameter.shape[split.dim], sum(sizes))
    if rest:
        raise ValueError(f"{parameter.name} {parameter.shape}: {split} does not fit axes of {sizes}")
    found, first = [], 0
    for axis, size in zip(axes, sizes, strict=True):
        start, end = cut.intervals[axis][tp_rank]
        found.append(((first + start) * width, (first + end) * width))
        first += size
    return tuple(found)


def shard_shape(parameter: ParameterSpec, cut: AxisCut, tp_rank: int) -> tuple[int, ...]:
    """Shape of what the rank owns: its intervals joined."""
    if parameter.split is None:
        return parameter.shape
    size = sum(end - start for start, end in shard_intervals(parameter, cut, tp_rank))
    dim = parameter.split.dim
    return (*parameter.shape[:dim], size, *parameter.shape[dim + 1 :])


def _holds(conditions: Iterable[str], flags: dict[str, bool]) -> bool:
    return all(flags[name.lstrip("!")] is not name.startswith("!") for name in conditions)


def _parameter(spec: ModelSpec, row: dict[str, object], name: str) -> ParameterSpec:
    split, shape, dtype, half = row.get("split"), row["shape"], row.get("dtype"), row.get("half_dtype")
    if not isinstance(shape, list):
        raise TypeError(f"families.json: {name} has no shape")
    return ParameterSpec(
        name=name,
        shape=tuple(spec.dims[dim] for dim in shape),
        split=Split(**(split | {"axes": tuple(split.get("axes", ()))})) if isinstance(split, dict) else None,
        once=bool(row.get("once", False)),
        dtype=dtype if isinstance(dtype, str) else None,
        half_dtype=half if isinstance(half, str) else None,
    )


def _spread(size: int, parts: int) -> list[Interval]:
    """[0, size) in consecutive parts that differ by at most one, the larger first."""
    base, more = divmod(size, parts)
    edges = [0]
    for part in range(parts):
        edges.append(edges[-1] + base + (part < more))
    return list(itertools.pairwise(edges))


def _even(axis: str, size: int, tensor: int) -> tuple[Interval, ...]:
    """As even as possible at multiples of 32, or of 16 or 8 where 32 would make the parts too uneven.

    Not below 8 while every rank can have 8: grouped matrix products want rows of whole 16 bytes.
    """
    if size < tensor:
        raise ConfigError(
            f"parallel.tensor is {tensor}, but the model's {axis} axis has only {size} positions to share"
        )
    # 8 units a rank keep the largest part within an eighth of the mean
    unit = next((u for u in (32, 16) if size >= 8 * u * tensor or size % (u * tensor) == 0), 8)
    while size < unit * tensor:
        unit //= 2
    return tuple((start * unit, min(end * unit, size)) for start, end in _spread(-(-size // unit), tensor))


def _heads(num_heads: int, num_kv_heads: int, tensor: int) -> tuple[tuple[Interval, ...], tuple[Interval, ...]]:
    if tensor > num_heads:
        raise ConfigError(
            f"parallel.tensor is {tensor}, but the model has only {num_heads} attention heads: "
            f"use at most {num_heads}, and parallel.pipeline for more ranks"
        )
    group = num_heads // num_kv_heads
    if tensor <= num_kv_heads:
        kv = _spread(num_kv_heads, tensor)
        return tuple((start * group, end * group) for start, end in kv), tuple(kv)
    owner = [rank * num_kv_heads // tensor for rank in range(tensor)]
    q: list[Interval] = []
    for head in range(num_kv_heads):
        q += [(head * group + start, head * group + end) for start, end in _spread(group, owner.count(head))]
    return tuple(q), tuple((head, head + 1) for head in owner)
