"""What `encoding: as-is` costs in accuracy for each tensor type of GGUF, and how fast each is read.

Run: python benchmarks/gguf_loss.py [--speed]

Prints a table in markdown. Types that the gguf package can quantize to: a Gaussian matrix, quantized by it. The others:
random blocks with scales that are finite. Loss: RMS of (decoded − dequantised) / RMS of dequantised. --speed adds what
one core reads in a second of its time, as floats and as is, of a tensor of 100 MB that is in the page cache.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from dist_infer.model.shards import Wanted
from dist_infer.model.source import CheckpointSource
from dist_infer.model.stored import stored_encodings
from offload.encoded import EncodedTensor
from offload.quantize import encode
from partition.checkpoint import open_checkpoint
from partition.encoding import EncodingChoice
from partition.gguf_types import AS_IS
from partition.model_spec import ModelSpec
from partition.sharding import cut_axes, units_of

Bytes = NDArray[np.uint8]
Content = Mapping[str, tuple[str, Bytes]]

# where a block has the float16 that everything in it is multiplied with
_SCALES_AT = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S"), (0,)),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ1_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Bytes:
    """[rows, bytes of a row]: any bytes, but scales about 0.01."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    count = rows * columns // block
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in _SCALES_AT.get(kind, ()):
        raw[:, at : at + 2] = rng.uniform(0.005, 0.02, (count, 1)).astype(np.float16).view(np.uint8)
    if kind == "IQ1_M":  # the float16 lies in the upper nibbles of four words
        bits = rng.uniform(0.005, 0.02, count).astype(np.float16).view(np.uint16)
        for word in range(4):
            at = 49 + 2 * word
            raw[:, at] = raw[:, at] & 15 | ((bits >> 4 * word & 15) << 4).astype(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(118, 124, count)
    if kind == "NVFP4":
        raw[:, :4] = rng.integers(8, 64, (count, 4))
    return raw.reshape(rows, columns // block * size)


def blocks_of(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[Bytes, bool]:
    """A matrix in a type, and whether it was quantized from a Gaussian one."""
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.02
    try:
        return gguf.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8), True
    except NotImplementedError:
        return random_blocks(kind, rows, columns, seed), False


def write_gguf(path: Path, arch: str, metadata: Mapping[str, float | int], tensors: Content) -> Path:
    """A file of bytes that are in their type already: name -> (type, uint8 [.., bytes of a row])."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    for name, (kind, raw) in tensors.items():
        if kind == "F32":
            writer.add_tensor(name, raw.view(np.float32))
        else:
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one_layer(
    path: Path, kind: str, hidden: int = 256, inter: int = 512, seed: int = 0, *, random: bool = False
) -> tuple[Path, bool]:
    """A llama of one layer, all its matrices in a type; and whether they are Gaussian (`random`: blocks never are)."""
    floats = np.ones(hidden, dtype=np.float32).view(np.uint8)
    embedding = np.zeros((64, hidden), dtype=np.float32).view(np.uint8)
    tensors = {"token_embd.weight": ("F32", embedding), "output_norm.weight": ("F32", floats)}
    tensors |= {f"blk.0.{name}.weight": ("F32", floats) for name in ("attn_norm", "ffn_norm")}
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, hidden))
    shapes |= {"ffn_gate": (inter, hidden), "ffn_up": (inter, hidden), "ffn_down": (hidden, inter)}
    gaussian = False
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        if random:  # the same blocks again and again
            raw = np.resize(random_blocks(kind, 256, hidden), (rows, columns // block * size))
        else:
            raw, gaussian = blocks_of(kind, rows, columns, seed + number)
        tensors[f"blk.0.{name}.weight"] = (kind, raw)
    metadata = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": hidden,
        "feed_forward_length": inter,
        "attention.head_count": 4,
        "attention.head_count_kv": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    return write_gguf(path, "llama", metadata, tensors), gaussian


def source_of(path: Path, *, wished: str) -> CheckpointSource:
    """The packer's source of a file, in bfloat16."""
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    choice = EncodingChoice(wished=wished, stored=stored_encodings(index, spec))
    return CheckpointSource(index=index, spec=spec, tensor=1, tp_ranks=[0], dtype=torch.bfloat16, encodings=choice)


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def loss_row(kind: str, directory: Path) -> list[str]:
    """Type, how it is kept, bits a weight stored and kept, loss, and for comparison what the type itself loses."""
    name = "model.layers.0.mlp.down_proj.weight"
    path, gaussian = one_layer(directory / "loss.gguf", kind, 1024, 2048)
    kept = source_of(path, wished="as-is").load_unit("layers.0")[0][name]
    if not isinstance(kept, EncodedTensor):
        raise RuntimeError(f"{kind} was kept as a float")
    raw, _ = blocks_of(kind, 1024, 2048, 6)
    expected = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    values = torch.from_numpy(np.random.default_rng(6).standard_normal((1024, 2048)).astype(np.float32) * 0.02)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    loss = relative_rms(kept.decode(torch.float32), expected)
    other = "int8-g32" if kept.encoding == "int4-g32" else "int4-g32"
    in_other = relative_rms(encode(expected, other, torch.float32).decode(), expected)
    return [
        kind,
        f"`{kept.encoding}`",
        f"{8 * size / block:.2f}",
        f"{8 * kept.nbytes / kept.numel():.2f}",
        "exact" if loss == 0 else f"{100 * loss:.3f} %",
        f"`{other}` {100 * in_other:.2f} %",
        f"{100 * relative_rms(expected, values):.2f} %" if gaussian else "(random blocks)",
    ]


def speed_row(kind: str, directory: Path, num_bytes: int = 100_000_000) -> list[str]:
    """Millions of weights (and MB of the file) per second of one core, as floats in bfloat16 and as is."""
    columns = 1024
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows = num_bytes // (columns // block * size) // 256 * 256
    path, _ = one_layer(directory / "speed.gguf", kind, columns, rows, random=True)
    index = open_checkpoint(path)
    spec = ModelSpec.from_config(index.config)
    parameter = next(p for u in units_of(spec) for p in u.parameters if p.name.endswith("up_proj.weight"))
    reader = source_of(path, wished="as-is").reader
    cells = [kind]
    for encoding in ("raw", AS_IS[kind]):
        started = time.process_time()
        reader.parts(parameter, cut_axes(spec, 1), [Wanted(tp_rank=0, encoding=encoding, shape=parameter.shape)])
        seconds = time.process_time() - started
        weights, stored = rows * columns / seconds / 1e6, rows * columns // block * size / seconds / 1e6
        cells.append(f"{weights:.0f} M/s ({stored:.0f})")
    return cells


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        head = ["type", "kept as", "bits stored", "bits kept", "added loss", "the other choice", "the type's own loss"]
        print(table(head, [loss_row(kind, directory) for kind in AS_IS]))
        if "--speed" in sys.argv[1:]:
            torch.set_num_threads(1)  # the readers' threads are as many
            rows = [speed_row(kind, directory) for kind in AS_IS]
            print()
            print(table(["type", "as bfloat16 (MB/s of the file)", "as is (MB/s of the file)"], rows))


if __name__ == "__main__":
    main()
