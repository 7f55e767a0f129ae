"""At-rest encodings: which parameters are kept in fewer bits, and how many bytes that takes. No weights, no torch.

    raw          the tensor's own float type
    int8         bytes, one float32 scale a row
    int8-g32     bytes, one float16 scale for 32 columns of a row (what Q8_0 of GGUF is)
    int4-g<n>    nibbles, float16 scale and minimum for n columns of a row: w = scale·q + minimum, q in 0..15 (n = 32
                 holds Q4_0 and Q4_1 of GGUF exactly)
    fp8-g<n>     float8_e4m3fn, one float32 scale for n columns of a row

Rows are padded to whole tiles of 16. Codes lie so that 64 bytes are what a vector unit computes from at once, in
16-bit words (row r, parity j) at word 2r + j of the 64 bytes:

    int4         [tiles, columns/8, 64]   nibble t (bits 4t..4t+3) of a word: column 8b + 2t + j
    int8, fp8    [tiles, columns/4, 64]   byte t of a word: column 4b + 2t + j; an int8 is stored as q + 128
    scales       [tiles, columns/group, 16] (int4: [tiles, columns/group, 2, 16], scale then minimum)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from partition.sharding import ParameterSpec

RAW = "raw"
ENCODINGS = ("float", "int8", "int4", "fp8", "as-is")
GROUP_SIZES = (128, 64, 32)
DEFAULT_GROUP_SIZE = 64
ROWS_PER_TILE = 16
LEAST_GROUP = 32
_ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight", ".shared_expert_gate.weight")
# multiplies from both sides, so that it would be decoded for every micro-batch (13 ms of a core a layer of DeepSeek-V3)
# to save 23 MiB a layer (0.4 % of that model in int4)
_LATENT_EXPANSION = ".kv_b_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One array of an encoded tensor: "codes" or "scales". dtype by torch's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EncodingChoice:
    """What a run asks for, and what that means for each parameter.

    `group_size`: the widest groups of int4. `stored`: for as-is, the encoding that keeps a parameter as the checkpoint
    has it; a parameter that is not listed is a float there.
    """

    wished: str = "float"
    group_size: int = DEFAULT_GROUP_SIZE
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What stores are keyed by."""
        return f"int4-g{self.group_size}" if self.wished == "int4" else self.wished

    def of(self, unit: str, parameter: ParameterSpec, shape: tuple[int, ...]) -> str:
        """The encoding of one rank's part, `shape`, of a parameter.

        Embeddings, head, norms, biases, routers, the expansion of latent attention and whatever has to stay exact are
        raw; so are widths that no group of 32 divides, and experts whose rows do not fill whole tiles.
        """
        exact = parameter.is_exact or parameter.name.endswith((*_ROUTERS, _LATENT_EXPANSION, "bias"))
        if not unit.startswith("layers.") or exact or len(shape) not in (2, 3) or 0 in shape:
            return RAW
        if shape[-1] % LEAST_GROUP or (len(shape) == 3 and shape[1] % ROWS_PER_TILE):
            return RAW
        if self.wished == "as-is":
            return self.stored.get(parameter.name, RAW)
        if self.wished == "int8":
            return "int8"
        if self.wished in ("int4", "fp8"):
            widest = self.group_size if self.wished == "int4" else max(GROUP_SIZES)
            return f"{self.wished}-g{next(g for g in GROUP_SIZES if g <= widest and shape[-1] % g == 0)}"
        return RAW


def group_of(encoding: str, columns: int) -> int:
    """Columns that share a scale. Raises ValueError for no encoding of ours."""
    if encoding == "int8":
        return columns
    kind, _, group = encoding.partition("-g")
    if kind not in ("int8", "int4", "fp8") or not group.isdecimal() or int(group) not in GROUP_SIZES:
        raise ValueError(f"unknown encoding {encoding!r}")
    return int(group)


def parts_of(encoding: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The arrays that hold a tensor [.., rows, columns] in an encoding other than raw. Raises ValueError."""
    columns = shape[-1] if len(shape) > 1 else 0
    group = group_of(encoding, columns)
    if columns <= 0 or columns % group or columns % LEAST_GROUP:
        raise ValueError(f"{encoding} cannot hold {shape}")
    tiles = -(-math.prod(shape[:-1]) // ROWS_PER_TILE)
    kind = encoding.partition("-")[0]
    codes = Part(name="codes", dtype="uint8", shape=(tiles, columns // (8 if kind == "int4" else 4), 64))
    scales: tuple[int, ...] = (tiles, columns // group, ROWS_PER_TILE)
    if kind == "int4":
        scales = (tiles, columns // group, 2, ROWS_PER_TILE)
    small = kind == "int4" or encoding == "int8-g32"
    return codes, Part(name="scales", dtype="float16" if small else "float32", shape=scales)
