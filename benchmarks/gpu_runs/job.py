"""What a competitor is told, the model that all of them run, and the one JSON line that each prints. No torch."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SKIPPED_PASSES = 2  # decode passes before the figures begin: traces are learned and memory is taken in them
_BLOCK_ELEMENTS = (4 << 20) + 4099  # odd, so that no two layers are alike
_ONE = b"\x80\x3f"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's dimensions; all weights are bfloat16."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def layer(self, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of a layer's parameters."""
        stem = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{stem}{norm}.weight", (self.hidden,)
        for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            yield f"{stem}self_attn.{part}_proj.weight", (heads * self.head_dim, self.hidden)
        yield f"{stem}self_attn.o_proj.weight", (self.hidden, self.heads * self.head_dim)
        for part in ("gate", "up"):
            yield f"{stem}mlp.{part}_proj.weight", (self.intermediate, self.hidden)
        yield f"{stem}mlp.down_proj.weight", (self.hidden, self.intermediate)

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) in the order of use."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for index in range(self.layers):
            yield from self.layer(index)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    @property
    def layer_bytes(self) -> int:
        return 2 * sum(math.prod(shape) for _, shape in self.layer(0))

    @property
    def end_bytes(self) -> int:
        """Embedding, final norm and head."""
        return 2 * (2 * self.vocab + 1) * self.hidden

    @property
    def num_bytes(self) -> int:
        return self.layers * self.layer_bytes + self.end_bytes

    def kv_bytes(self, tokens: int) -> int:
        """Of a sequence's KV cache, in blocks of 16 positions and one more."""
        return 16 * (-(-tokens // 16) + 1) * self.layers * 4 * self.kv_heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """config.json. No padding id: an embedding that is not there cannot have a row of it zeroed."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


# a layer is 1.71 GB: what a link of 50 GB/s takes 34 ms for
FULL = {"hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 8, "head_dim": 128, "vocab": 32000}
TINY = {"hidden": 256, "intermediate": 704, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 1024}


@dataclass(frozen=True, kw_only=True)
class Job:
    """model: the checkpoint's folder. work: where a store may be made. setting: the competitor's own, e.g. a tier.

    resident_layers: how many layers stay on the device, the same for every competitor that can be told so.
    """

    model: str
    work: str
    device: str
    setting: str
    batches: Sequence[int]
    prompt_tokens: int
    new_tokens: int
    shape: Shape
    resident_layers: int = 0

    def prompts(self, batch: int) -> list[list[int]]:
        """Token ids, different for each sequence, the same for every competitor."""
        low, span = 3, self.shape.vocab - 3
        return [
            [low + (7919 * (n * self.prompt_tokens + i) + 101) % span for i in range(self.prompt_tokens)]
            for n in range(batch)
        ]


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Decoding at one batch size after the first SKIPPED_PASSES. Bytes are those that move once a pass.

    link_bytes_per_s: pinned copies just before and after, their mean; 0 where there is no device to copy to.
    disk_bytes_per_s: raw direct reads of the store before and after, for what comes from disk; else 0.
    """

    batch: int
    passes: int
    seconds: float
    streamed_bytes: int
    link_bytes_per_s: float
    disk_bytes_per_s: float = 0.0
    stall_s: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)

    @property
    def bytes_per_s(self) -> float:
        return self.passes * self.streamed_bytes / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.passes * self.batch / self.seconds

    @property
    def limit_bytes_per_s(self) -> float:
        """What the bytes have to pass: the slower of link and disk; 0 when neither was measured."""
        return min((rate for rate in (self.link_bytes_per_s, self.disk_bytes_per_s) if rate), default=0.0)


def decode_of(batch: int, ends_s: Sequence[float], **figures: Any) -> Decode:
    """From the times at which the decode passes ended; the first SKIPPED_PASSES are left out.

    Raises ValueError when none is left.
    """
    kept = ends_s[SKIPPED_PASSES - 1 :]
    if len(kept) < 2:
        raise ValueError(f"{len(ends_s)} decode passes: at least {SKIPPED_PASSES + 1} are needed")
    return Decode(batch=batch, passes=len(kept) - 1, seconds=kept[-1] - kept[0], **figures)


def write_model(folder: Path, shape: Shape) -> Path:
    """config.json and model.safetensors: pseudo-random weights from one repeated block, as fast as the disk is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    header, position = {}, 0
    for name, dims in shape.parameters():
        size = 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = memoryview(_weights(_BLOCK_ELEMENTS))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dims in shape.parameters():
            left = 2 * math.prod(dims)
            if len(dims) == 1:
                file.write(_ONE * dims[0])
                continue
            while left:
                left -= file.write(block[:left])
    return folder


def _weights(count: int) -> bytearray:
    """bfloat16 of 0.008 to 0.03, either sign: activations stay near 1 at the widths here."""
    source = random.Random(0)
    values = bytearray(2 * count)
    values[::2] = source.randbytes(count)
    values[1::2] = source.randbytes(count).translate(bytes(0x3C | sign & 0x80 for sign in range(256)))
    return values


def read_job() -> Job:
    """The job whose file is this script's argument."""
    values = json.loads(Path(sys.argv[1]).read_text())
    return Job(**{**values, "shape": Shape(**values["shape"])})


def finish(decodes: Sequence[Decode], *, packages: Sequence[str], load_s: float, notes: dict[str, Any]) -> None:
    """Print the result. notes: settings and whatever else belongs beside the figures."""
    print(
        json.dumps(
            {"decodes": [asdict(d) for d in decodes], "load_s": load_s, "versions": _versions(packages), "notes": notes}
        ),
        flush=True,
    )


def clock() -> float:
    """Seconds; the clock of all figures here and of the ranks' timelines."""
    return time.perf_counter()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source tree"
    return found
